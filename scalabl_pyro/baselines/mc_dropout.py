"""Monte Carlo dropout on the input of A (Gal and Ghahramani, 2016), with masks that belong to draws.

Dropout is a distribution over weights when a mask is held for a whole forward pass: A_i = A diag(m_i), with m_i in
{0, 1 / (1 - p)} for each input feature. So a mask is drawn for a *draw* (in training: for each row), and holds for all
its tokens. Ordinary dropout draws anew for each token and each batch; its "draw i" is no function, so that neither
joint predictions nor mutual information would mean anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from ..lora.binding import RowNoise
from ..lora.factors import Factors
from ..tasks import Task
from .factor_posterior import FactorNoise, FactorPosterior
from .mle import POINT_LR, fit_point, plain_lora, unloaded_on_error
from .noisy import NoisyLoRA
from .predictor import BaselineResult


def mc_dropout(
    module: nn.Module,
    task: Task,
    train_data: Any,
    *,
    p: float = 0.1,
    lr: float = POINT_LR,
    lora: Mapping[str, Any] | None = None,
    **options: Any,
) -> BaselineResult:
    """Plain LoRA trained and used with dropout on the input of A.

    In training each row of a batch has a mask of its own over the input features of each layer, which all its tokens
    share; a draw of the posterior is one such mask. No KL enters the loss; ``factor_scale=`` adds the weight decay that
    makes dropout an approximate posterior.

    Args:
        module: the base model; it is adapted in place.
        task: the likelihood.
        train_data: as for :func:`scalabl_pyro.fit`.
        p: probability that a feature is dropped.
        lr: of both factors, heads, and the task's parameters.
        lora: options of :func:`scalabl_pyro.bayesian_lora` (rank, targets, ...).
        options: options of :func:`scalabl_pyro.fit` (steps, ...); ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior draws masks.

    Raises:
        ValueError: p outside of (0, 1).
    """
    noise = DropoutNoise(p)
    blora = DropoutLoRA(plain_lora(module, lora).adapter, p)
    with unloaded_on_error(blora):
        result = fit_point(blora, task, train_data, lr=lr, **options)
    provenance = {"method": "MC dropout", "p": p}
    return BaselineResult(FactorPosterior(result.posterior, noise, provenance), result.history)


@dataclass(frozen=True)
class DropoutNoise(FactorNoise):
    """A_i = A diag(m_i) with m_i = 0 with probability p, else 1 / (1 - p).

    Attributes:
        p: probability that an input feature of a layer is dropped.
    """

    family: ClassVar[str] = "dropout"

    p: float

    def __post_init__(self) -> None:
        if not (isinstance(self.p, float) and 0 < self.p < 1):
            raise ValueError(f"p={self.p!r}: the probability to drop a feature must lie between 0 and 1.")

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Factors with the columns of A masked."""
        while True:
            yield tuple((A * keep(A.new_empty(A.shape[1]), self.p, generator), B) for A, B in factors)

    def options(self) -> dict[str, Any]:
        """The probability."""
        return {"p": self.p}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "DropoutNoise":
        """The noise again."""
        return cls(**options)


class DropoutLoRA(NoisyLoRA):
    """An adapted LLM with a mask a row and layer.

    Args:
        adapter: the LoRA layers.
        p: probability that a feature is dropped.
    """

    def __init__(self, adapter: Any, p: float) -> None:
        super().__init__(adapter)
        self.p = p

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """A diag(m) = A + A diag(m - 1)."""
        return [RowNoise(A, inputs=keep(A.new_empty(rows, A.shape[1]), self.p) - 1) for A, _ in self.adapter.factors()]


def keep(like: Tensor, p: float, generator: Generator | None = None) -> Tensor:
    """A tensor of 0 with probability p, else 1 / (1 - p), of the shape of ``like``."""
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator) / (1 - p)
