"""The arguments of a Pyro model as what a CUDA graph needs: tensors to copy into, and a key of all else."""

import enum
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batch import Batch

#: Values that a replay may hold fixed, because calls with other values have another key.
PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device),
    # Compared by identity; they live as long as the program, so the keys keep nothing alive.
    *(nn.Module, FunctionType, type),
)


class CallArguments:
    """Arguments of one call, in which tensors can stand in lists, tuples, dicts, ``BatchEncoding`` and ``Batch``.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        context: Further values that calls must share to use one captured graph.

    Example:
        >>> given = CallArguments((torch.ones(2),), {"labels": None})
        >>> [name for name, _ in given.leaves()]
        ['argument 0', 'labels']
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, context: tuple[Any, ...] = ()) -> None:
        self.args = args
        self.context = context
        self.kwargs = dict(kwargs)

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yield each value that is not a container, with the name to call it by in a message."""
        for i, value in enumerate(self.args):
            yield from _leaves(f"argument {i}", value)
        for name, value in self.kwargs.items():
            yield from _leaves(name, value)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: value for name, value in self.leaves() if torch.is_tensor(value)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All tensors by the last part of their names, such as ``position_ids``."""
        return {name.rpartition(".")[-1]: value for name, value in self.tensors.items()}

    def shapes(self) -> tuple[Any, ...]:
        """Return what calls must share to use one captured graph."""
        own = (
            (name, value.shape, value.dtype) if torch.is_tensor(value) else (name, type(value), value)
            for name, value in self.leaves()
        )
        return (*own, *self.context)

    def why_not(self, device: torch.device) -> str | None:
        """Say why a graph cannot stand for calls like this one; None if it can.

        Args:
            device: Device of the parameters.
        """
        for name, value in self.leaves():
            if not torch.is_tensor(value):
                if not isinstance(value, PLAIN):
                    return f"{name} is of type {type(value).__name__}: a replay would not see what changes in it"
            elif value.device != device:
                return f"{name} is on {value.device}, and the parameters are on {device}: move it before the step"
            elif value.requires_grad:
                return f"{name} requires a gradient"
        return None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "CallArguments":
        """Return the same arguments with ``fn`` applied to every tensor."""
        return CallArguments(
            tuple(_mapped(value, fn) for value in self.args),
            {name: _mapped(value, fn) for name, value in self.kwargs.items()},
            context=self.context,
        )

    def copy_(self, other: "CallArguments") -> None:
        """Overwrite all tensors with those of arguments of the same shapes."""
        theirs = other.tensors
        for name, tensor in self.tensors.items():
            tensor.copy_(theirs[name], non_blocking=True)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Batch):
        yield from ((f"{name}.{part}", tensor) for part, tensor in value.tensors().items())
        # A part of a joint batch has other numbers that a program may read.
        yield f"{name}.start", value.start
        yield f"{name}.joint", value.joint
    elif isinstance(value, dict | UserDict):
        yield f"{name}.{{}}", type(value)
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        yield f"{name}.[]", type(value)
        for i, item in enumerate(value):
            yield from _leaves(f"{name}.{i}", item)
    else:
        yield name, value


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if torch.is_tensor(value):
        return fn(value)
    if isinstance(value, Batch):
        return value.map(fn)
    if isinstance(value, dict | UserDict):
        return type(value)({key: _mapped(item, fn) for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [_mapped(item, fn) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
