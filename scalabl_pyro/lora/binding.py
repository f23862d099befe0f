"""What one forward pass computes with, kept in a context variable for the duration of the pass.

No draw is ever written into a shared module, so that several threads can run one module with different draws.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .factors import Factors


@dataclass(frozen=True)
class RowNoise:
    """Noise on the matrix A of one layer, different for each row of a forward pass.

    The layer adds outputs * (matrix (inputs * x)) to A x. Row b then computes with the matrix
    A + diag(outputs[b]) matrix diag(inputs[b]), and no tensor (rows, r, in) is built. Sign vectors give the
    pseudo-independent matrices of Flipout (Wen et al., 2018), masks give dropout.

    Attributes:
        matrix: Noise matrix, (r, in).
        inputs: Factor of each input and row, (rows, in); None means 1.
        outputs: Factor of each output and row, (rows, r); None means 1.
    """

    matrix: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Bound:
    """What one forward pass of an adapter computes with.

    Attributes:
        factors: (A, B) of each layer, with the gauge applied and in the dtype of the layer.
        s: gamma * s of each layer, (r,) or (rows, r).
        positions: Index of the only token of each row that the output head sees, (rows,); None for all tokens.
        heads: Modules that replace the trained heads.
        fan_out: (batch_shape, rows): the first adapted block repeats ``rows`` rows to ``batch_shape``.
        noise: Noise that each layer adds to A x.
    """

    factors: Factors = ()
    s: tuple[Tensor, ...] = ()
    positions: Tensor | None = None
    heads: Mapping[str, nn.Module] | None = None
    fan_out: tuple[torch.Size, int] | None = None
    noise: Sequence[RowNoise] | None = None


#: Stands for "nothing was bound": the adapter then computes at its resting point.
UNBOUND = Bound()
_BOUND: ContextVar[Mapping[object, Bound | None]] = ContextVar("scalabl_pyro_bound", default=MappingProxyType({}))


@contextmanager
def binding(owner: object, bound: Bound | None) -> Iterator[None]:
    """Let passes of the adapter ``owner`` compute with ``bound`` inside the context; None disables the adapter."""
    token = _BOUND.set({**_BOUND.get(), owner: bound})
    try:
        yield
    finally:
        _BOUND.reset(token)


def bound_to(owner: object) -> Bound | None:
    """What the adapter ``owner`` computes with now; None when it is disabled."""
    return _BOUND.get().get(owner, UNBOUND)
