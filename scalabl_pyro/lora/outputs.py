"""The tensors in the output of a module: a tensor, tuples, lists, or a Hugging Face output."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(x: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply a function to each tensor in an output.

    Args:
        x: Output. Mappings are changed in place, because a Hugging Face output is one.
        function: Function of one tensor.

    Returns:
        The output with the new values; anything that is not a tensor stays as it is.
    """
    if torch.is_tensor(x):
        return function(x)
    if isinstance(x, Mapping):
        for key, value in x.items():
            x[key] = map_tensors(value, function)  # type: ignore[index]  # ModelOutput is a mutable mapping
        return x
    if isinstance(x, tuple | list):
        return type(x)(map_tensors(v, function) for v in x)
    return x


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half-precision outputs to float32, in which log-probabilities are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def tensors_in(output: Any) -> list[Tensor]:
    """Return all tensors in an output, also those inside of nested tuples, lists and mappings."""
    if torch.is_tensor(output):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in tensors_in(value)]
    return []


def first_of(output: Any) -> Any:
    """Return the first item of an output, which is its main tensor. For a Hugging Face output this is the logits."""
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    while isinstance(output, tuple | list):
        output = output[0]
    return output
