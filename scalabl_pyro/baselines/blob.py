"""BLoB: a mean-field normal posterior of the factor A (Wang et al., NeurIPS 2024).

q(A) = Normal(M, G^2), where G^2 are standard deviations and G is what is learned; p(A) = Normal(0, 0.2); B is a point.
The ELBO is that of :func:`scalabl_pyro.fit`: the Pyro site ``"s"`` is the *noise* E = A - M of all layers in one
vector, q(E) = Normal(0, G^2) and p(E) = Normal(-M, 0.2), so that KL(q || p) is that of A, and M stays where every other
method has its A.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn

from .._errors import check_positive
from ..guides import DeltaGuide, Guide
from ..lora.adapter import Adapter
from ..lora.binding import RowNoise
from ..lora.factors import Factors
from ..posterior.posterior import Posterior
from ..priors import Prior, as_prior
from ..tasks import Task
from ..training.fit import fit
from ..training.result import FitResult, TrainingError
from .factor_posterior import FactorNoise, FactorPosterior
from .mle import plain_lora, unloaded_on_error
from .noisy import NoisyLoRA
from .predictor import BaselineResult


def blob(
    module: nn.Module,
    task: Task,
    train_data: Any,
    *,
    prior_scale: float = 0.2,
    init_root_scale: float = 0.05,
    kl_weight: float | Callable[[int], float] = 1.0,
    lr: float = 4e-3,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> BaselineResult:
    """Learn mean and standard deviation of each entry of A, and B, by one ELBO.

    All rows of a batch share one draw of the noise, made pseudo-independent by random signs a row (Flipout, Wen et al.,
    2018), so that the gradient's noise falls with the batch size. A draw of the posterior is one matrix a layer. (The
    released code draws signs for each *token*, and steps the KL with an optimizer of its own.)

    Args:
        module: the base model; it is adapted in place.
        task: the likelihood.
        train_data: as for :func:`scalabl_pyro.fit`.
        prior_scale: standard deviation of the prior of each entry of A.
        init_root_scale: square root of the largest initial standard deviation; the roots start uniform on
            (init_root_scale / sqrt(2), init_root_scale).
        kl_weight: weight of KL(q || p), 1 is the ELBO; the paper's schedule is
            ``KLReweighting(num_data=N, batch_size=B)``.
        lr: of A's means, B and heads.
        lora: options of :func:`scalabl_pyro.bayesian_lora` (rank, targets, ...).
        seed: of the initial roots, the data order and the noise.
        options: options of :func:`scalabl_pyro.fit` (steps, ...); ``lr_A`` and ``lr_scale``, of the roots, are ``lr``
            by default.

    Returns:
        A result whose posterior draws A.

    Raises:
        ValueError: a scale that is not positive and finite.
        TrainingError: a loss or gradient that is not finite; its ``result`` holds what was learned before.
    """
    check_positive(prior_scale=prior_scale, init_root_scale=init_root_scale)
    adapter = plain_lora(module, lora).adapter
    guide = NoiseGuide(adapter, init_root_scale=init_root_scale, seed=seed)
    blora = FlipoutLoRA(adapter, prior=NoisePrior(adapter, prior_scale))
    options = {"lr": lr, "lr_A": lr, "lr_scale": lr, **options}
    try:
        with unloaded_on_error(blora):
            result = fit(blora, task, train_data, guide=guide, kl_weight=kl_weight, seed=seed, **options)
    except TrainingError as error:
        if error.result is not None:
            error.result = _as_result(error.result, prior_scale)  # type: ignore[assignment]
        raise
    finally:
        adapter.rest_at(torch.ones(adapter.subspace.dim, dtype=adapter.factors()[0][0].dtype))
    return _as_result(result, prior_scale)


@dataclass(frozen=True)
class NormalNoise(FactorNoise):
    """A ~ Normal(M, scale), independent entries.

    Attributes:
        scales: (r, in) standard deviations of each layer.
    """

    family: ClassVar[str] = "normal"

    scales: tuple[Tensor, ...]

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Factors with noise on A."""
        while True:
            yield tuple(
                (A + scale * torch.randn(A.shape, generator=generator, dtype=A.dtype), B)
                for (A, B), scale in zip(factors, self.scales, strict=True)
            )

    def tensors(self) -> dict[str, Tensor]:
        """The scales by layer."""
        return {f"scale_{i}": scale for i, scale in enumerate(self.scales)}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "NormalNoise":
        """The noise again."""
        scales = tuple(tensors[f"scale_{i}"] for i in range(len(factors)))
        for scale, (A, _) in zip(scales, factors, strict=True):
            if scale.shape != A.shape or not (scale >= 0).all():
                raise ValueError(f"A saved scale is {tuple(scale.shape)}, expected {tuple(A.shape)}, and no negative.")
        return cls(scales)


class NoiseGuide(Guide):
    """q(E) = Normal(0, G^2) at the site ``"s"``, E being the noise of all layers in one vector.

    Args:
        adapter: the LoRA layers.
        init_root_scale: largest initial G.
        seed: of the initial G.
    """

    per_example = False  # Flipout makes the rows differ

    def __init__(self, adapter: Adapter, *, init_root_scale: float, seed: int) -> None:
        super().__init__()
        A = flat(adapter)
        uniform = torch.rand(A.shape, generator=torch.Generator().manual_seed(seed), dtype=A.dtype)
        self.root_scale = nn.Parameter(init_root_scale * (math.sqrt(0.5) + (1 - math.sqrt(0.5)) * uniform))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the noise."""
        scale = self.root_scale.square()
        return pyro.sample("s", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """No noise."""
        return {"s": torch.zeros_like(self.root_scale)}


class NoisePrior(Prior):
    """p(E) = Normal(-M, scale), which is A = M + E ~ Normal(0, scale).

    Args:
        adapter: the LoRA layers, whose A are M.
        scale: standard deviation of the prior of A.
    """

    def __init__(self, adapter: Adapter, scale: float) -> None:
        super().__init__()
        self._means = [A for A, _ in adapter.factors()]  # a list: they are trained as factors, not as a prior
        self.scale_of_A = scale

    def forward(self) -> Tensor:
        """Sample the noise."""
        device = self._means[0].device
        mean = torch.cat([A.reshape(-1).to(device) for A in self._means])
        scale = torch.full_like(mean, self.scale_of_A)  # a number would come from the host, which no capture allows
        return pyro.sample("s", dist.Normal(-mean, scale).to_event(1))


class FlipoutLoRA(NoisyLoRA):
    """An adapted LLM that takes the noise of A for s, and gives each row signs of its own."""

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """E times an outer product of signs, for each row."""
        factors = self.adapter.factors()
        parts = s.split([A.numel() for A, _ in factors])
        return [
            RowNoise(part.view(A.shape).to(A.device), signs(A, rows, A.shape[1]), signs(A, rows, A.shape[0]))
            for part, (A, _) in zip(parts, factors, strict=True)
        ]


def signs(like: Tensor, *shape: int) -> Tensor:
    """1 or -1 with equal probability."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2).sub_(1)


def flat(adapter: Adapter) -> Tensor:
    """A of all layers in one vector, on the CPU."""
    return torch.cat([A.detach().reshape(-1).cpu() for A, _ in adapter.factors()])


def _as_result(result: FitResult, prior_scale: float) -> BaselineResult:
    """The posterior of E as a point posterior at M, and noise around it."""
    fitted = result.posterior
    ones = torch.ones(fitted.subspace.dim, dtype=fitted.factors[0][0].dtype)
    point: Posterior = replace(
        fitted,
        guide=DeltaGuide(ones, learn=False),
        prior=as_prior(1.0, fitted.subspace).to(ones.dtype),
    )
    assert isinstance(fitted.guide, NoiseGuide)
    scale = fitted.guide.root_scale.detach().square()
    parts = scale.split([A.numel() for A, _ in fitted.factors])
    scales = tuple(part.view(A.shape).clone() for part, (A, _) in zip(parts, fitted.factors, strict=True))
    provenance = {**fitted.provenance, "method": "BLoB", "prior_scale": prior_scale}
    return BaselineResult(FactorPosterior(point, NormalNoise(scales), provenance), result.history)
