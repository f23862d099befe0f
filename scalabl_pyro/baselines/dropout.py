"""Monte Carlo dropout on the input of A (Gal and Ghahramani, 2016), with one fixed mask per draw.

Dropout is a distribution over weights if a mask is fixed for a whole forward pass: A_i = A diag(m_i), where each entry
of m_i is 0 or 1 / (1 - p). So prediction samples one mask per *draw*, and training samples one mask per row; all tokens
share it. Ordinary dropout samples a new mask for each token and batch. A "draw" is then not a function, so joint
predictions and mutual information have no meaning.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from ..lora.binding import RowNoise
from ..lora.factors import Factors
from ..tasks import Task
from ..training.result import FitResult
from .factor_posterior import FactorPosterior, NoisyLoRA, WeightNoise
from .point_lora import POINT_LR, fit_point, plain_lora
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
    """Fine-tune plain LoRA with dropout on the input of A, and keep the dropout for prediction.

    In training each row of a batch has one mask per layer over the input features. All tokens of the row share it. A
    draw of the posterior is one such mask per layer. The loss has no KL term. ``factor_scale`` of the optimizer adds
    the weight decay that makes dropout an approximate posterior.

    Args:
        module: Base model. It is adapted in place.
        task: Task that encodes the rows and defines the likelihood.
        train_data: Training rows, as for :func:`scalabl_pyro.fit`.
        p: Probability that a feature is dropped.
        lr: Learning rate of both factors, the heads, and the task's parameters.
        lora: Options of :func:`scalabl_pyro.bayesian_lora`, such as ``r`` and ``target_modules``.
        options: Options of :func:`scalabl_pyro.fit`, such as ``num_steps``. ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior draws masks.

    Raises:
        ValueError: ``p`` is not between 0 and 1.
        TrainingError: The loss or gradient is not finite. ``result`` of the error holds what was learned before.

    References:
        Gal and Ghahramani, Dropout as a Bayesian Approximation, ICML 2016.

    Example:
        >>> result = scalabl_pyro.baselines.mc_dropout(llm, task, train_data, p=0.1, num_steps=1000)
        >>> result.posterior.predict(test_data, num_draws=10).epistemic
    """
    noise = DropoutNoise(p)

    def convert(result: FitResult) -> BaselineResult:
        posterior = FactorPosterior(result.posterior, noise, {"method": "MC dropout", "p": p})
        return BaselineResult(posterior, result.history)

    blora = DropoutLoRA(plain_lora(module, lora).adapter, p)
    return fit_point(blora, task, train_data, lr=lr, convert=convert, **options)


@dataclass(frozen=True)
class DropoutNoise(WeightNoise):
    """Dropout of the columns of A: A_i = A diag(m_i), where m_i is 0 with probability p, else 1 / (1 - p).

    Attributes:
        p: Probability that an input feature of a layer is dropped.

    Example:
        >>> scalabl_pyro.baselines.FactorPosterior(point, scalabl_pyro.baselines.DropoutNoise(0.1)).sample(3)
    """

    family: ClassVar[str] = "dropout"

    p: float

    def __post_init__(self) -> None:
        if not (isinstance(self.p, float) and 0 < self.p < 1):
            raise ValueError(f"p={self.p!r}: the probability to drop a feature must lie between 0 and 1.")

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Yield factors whose A has masked columns."""
        while True:
            yield tuple((A * keep(A.new_empty(A.shape[1]), self.p, generator), B) for A, B in factors)

    def options(self) -> dict[str, Any]:
        """Return the probability."""
        return {"p": self.p}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "DropoutNoise":
        """Restore the noise."""
        return cls(**options)


class DropoutLoRA(NoisyLoRA):
    """An adapted LLM that uses one dropout mask per row and layer.

    Args:
        adapter: LoRA layers.
        p: Probability that a feature is dropped.
    """

    def __init__(self, adapter: Any, p: float) -> None:
        super().__init__(adapter)
        self.p = p

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """Return the noise A diag(m - 1), so that A plus noise is A diag(m)."""
        return [RowNoise(A, inputs=keep(A.new_empty(rows, A.shape[1]), self.p) - 1) for A, _ in self.adapter.factors()]


def keep(like: Tensor, p: float, generator: Generator | None = None) -> Tensor:
    """Sample a mask with the shape of ``like``: 0 with probability p, else 1 / (1 - p)."""
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator) / (1 - p)
