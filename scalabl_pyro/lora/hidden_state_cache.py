"""Keep the hidden states that enter the first adapted block, so that later passes skip the blocks below it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn


class Prefix:
    """Hidden states that enter the first adapted block, for one batch.

    Attributes:
        hidden: Hidden states, shape (rows, tokens, width). None before the first pass.
        in_tuple: Whether the blocks of this model return tuples.
    """

    def __init__(self, hidden: Tensor | None = None, *, in_tuple: bool = False) -> None:
        self.hidden = hidden
        self.in_tuple = in_tuple

    def fits(self, x: Tensor) -> bool:
        """Tell whether the kept states have as many rows and tokens as ``x``."""
        return self.hidden is not None and self.hidden.shape[:2] == x.shape[:2]


_PREFIX: ContextVar[Mapping[object, Prefix]] = ContextVar("scalabl_pyro_prefix", default=MappingProxyType({}))


@contextmanager
def reuse(owner: object, prefix: Prefix | None) -> Iterator[None]:
    """Make passes of the adapter ``owner`` fill ``prefix``, or read from it once it is filled.

    Args:
        owner: Adapter whose passes are concerned.
        prefix: Hidden states to fill or to read. None changes nothing.
    """
    token = _PREFIX.set(_PREFIX.get() if prefix is None else {**_PREFIX.get(), owner: prefix})
    try:
        yield
    finally:
        _PREFIX.reset(token)


class PrefixStore:
    """Hidden states at the first adapted block for each row of a data set, kept over all epochs.

    Args:
        owner: Adapter whose hidden states are kept.
        num_data: Number of rows in the data set.
    """

    def __init__(self, owner: object, num_data: int) -> None:
        self.owner = owner
        self.rows: list[Tensor | None] = [None] * num_data
        self.in_tuple = False

    @contextmanager
    def reuse(self, index: Tensor, lengths: Tensor, width: int) -> Iterator[None]:
        """Use the store in the passes of one batch.

        If all rows of the batch are in the store, their hidden states come from there. Otherwise the pass computes them
        and the store keeps them.

        Args:
            index: Positions of the rows in the data set, shape (B,).
            lengths: Number of tokens per row without padding, shape (B,). The padding must be on the right.
            width: Number of tokens per row of the padded batch.
        """
        rows = index.tolist()
        kept = [self.rows[i] for i in rows]
        if all(k is not None for k in kept):
            states = [k for k in kept if k is not None]
            hidden = states[0].new_zeros(len(states), width, states[0].shape[-1])
            for row, state in zip(hidden, states, strict=True):
                row[: len(state)] = state
            prefix = Prefix(hidden, in_tuple=self.in_tuple)
        else:
            prefix = Prefix()
        with reuse(self.owner, prefix):
            yield
        if prefix.hidden is not None and len(prefix.hidden) == len(rows):
            self.in_tuple = prefix.in_tuple
            for i, state, length in zip(rows, prefix.hidden, lengths.tolist(), strict=True):
                if self.rows[i] is None:
                    self.rows[i] = state[:length].clone()


class HiddenStates:
    """Forward pre-hook (with kwargs) of the first adapted block: keep its hidden states, or insert the kept ones."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the block, or None to leave them unchanged."""
        prefix = _PREFIX.get().get(self.owner)
        if prefix is None or not args:
            return None
        if not prefix.fits(args[0]):
            prefix.hidden = args[0].detach()
            return None
        return (prefix.hidden, *args[1:]), kwargs


class SkippableForward:
    """Replacement for ``forward`` of a block below the adapted ones.

    It returns its input unchanged if kept hidden states replace the block's result later.
    """

    def __init__(self, owner: object, forward: Callable[..., Any]) -> None:
        self.owner = owner
        self.forward = forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or return its input unchanged."""
        prefix = _PREFIX.get().get(self.owner)
        if prefix is not None and prefix.fits(hidden_states):
            return (hidden_states,) if prefix.in_tuple else hidden_states
        output = self.forward(hidden_states, *args, **kwargs)
        if prefix is not None:
            prefix.in_tuple = isinstance(output, tuple)
        return output
