"""Storage of the latents and factors of one forward pass, in a context variable that lasts as long as the pass.

A draw is never written into a shared module. Several threads can therefore run one module with different draws.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from .factors import Factors
from .uses import using


@dataclass(frozen=True)
class RowNoise:
    """Noise on the matrix A of one layer, different for each row of a forward pass.

    The layer adds outputs * (matrix (inputs * x)) to A x. Row b then computes with the matrix
    A + diag(outputs[b]) matrix diag(inputs[b]), and no tensor (rows, r, in) is built. Sign vectors give the
    pseudo-independent matrices of Flipout (Wen et al., 2018), masks give dropout.

    Attributes:
        matrix: Noise matrix, (r, in).
        inputs: Multiplier of each input in each row, (rows, in); None means 1.
        outputs: Multiplier of each output in each row, (rows, r); None means 1.
    """

    matrix: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None


class Readout(Protocol):
    """What a pass computes of the hidden states at the output head, in the place of the logits."""

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Compute numbers per token.

        Args:
            head: The output head, (rows, tokens, width) -> logits (rows, tokens, vocabulary).
            hidden: Its input, (rows, T, width), at the positions that the pass reads.

        Returns:
            Numbers per token, (rows, T, C).
        """

    def repeat(self, batch_shape: torch.Size, rows: int) -> "Readout":
        """Return the readout for rows that are repeated from ``rows`` to ``batch_shape``, for each draw."""


@dataclass(frozen=True)
class Bound:
    """Latents, factors and options of one forward pass of an adapter.

    Attributes:
        factors: (A, B) of each layer, with the gauge applied and in the dtype of the layer.
        s: Product gamma * s of each layer, (r,) or (rows, r).
        positions: Index of the only token that the output head computes in each row, (rows,), or of T tokens,
            (rows, T); None means all tokens.
        heads: Modules that replace the trained heads, by path; None means the heads of the adapter.
        fan_out: Pair (batch_shape, rows). The first adapted block repeats ``rows`` rows to ``batch_shape``. None means
            that rows are not repeated.
        noise: Noise that each layer adds to A x; None means no noise.
        called: Set to which each layer adds its index when it is called; None means that nothing is recorded.
        readout: What the output head computes instead of logits; None means logits.
    """

    factors: Factors = ()
    s: tuple[Tensor, ...] = ()
    positions: Tensor | None = None
    heads: Mapping[str, nn.Module] | None = None
    fan_out: tuple[torch.Size, int] | None = None
    noise: Sequence[RowNoise] | None = None
    called: set[int] | None = None
    readout: Readout | None = None


#: Marks that nothing was bound. The adapter then computes at its resting point.
UNBOUND = Bound()
_BOUND: ContextVar[Mapping[object, Bound | None]] = ContextVar("scalabl_pyro_bound", default=MappingProxyType({}))


class Owner(Protocol):
    """An adapter, to which latents are bound."""

    module: nn.Module

    def check_attached(self) -> None:
        """Raise a RuntimeError if the layers were removed."""


@contextmanager
def binding(owner: Owner, bound: Bound | None) -> Iterator[None]:
    """Make passes of the adapter ``owner`` use ``bound`` inside the context; None disables the adapter.

    The layers of the adapter cannot be taken out of the module meanwhile.
    """
    with using(owner.module, "a pass"):
        owner.check_attached()
        token = _BOUND.set({**_BOUND.get(), owner: bound})
        try:
            yield
        finally:
            _BOUND.reset(token)


def bound_to(owner: object) -> Bound | None:
    """Return what is bound for the adapter ``owner``: None if it is disabled, ``UNBOUND`` if nothing is bound."""
    return _BOUND.get().get(owner, UNBOUND)
