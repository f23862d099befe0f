"""BLoB, Bayesian LoRA by backpropagation: a mean-field normal posterior of the factor A (Wang et al., NeurIPS 2024).

The posterior is q(A) = Normal(M, G^2), where G^2 are standard deviations and training learns M and G. The prior is
p(A) = Normal(0, 0.2). B is a point estimate. The loss is the ELBO of :func:`scalabl_pyro.fit`. The Pyro site ``"s"`` is
the *noise* E = A - M of all layers in one vector, with q(E) = Normal(0, G^2) and p(E) = Normal(-M, 0.2). So KL(q || p)
equals the KL of A, and M is stored where every other method stores A.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn

from .._errors import check_scale
from ..guides import DeltaGuide, Guide
from ..guides.initial_scale import draw_initial_scale
from ..lora.adapter import Adapter
from ..lora.binding import RowNoise
from ..lora.factors import Factors
from ..posterior.posterior import Posterior
from ..priors import Prior, as_prior
from ..tasks import Task
from ..training.fit import fit
from ..training.option_groups import optimizer_with
from ..training.result import FitResult
from .factor_posterior import FactorPosterior, NoisyLoRA, WeightNoise
from .point_lora import plain_lora, unloaded_on_error
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
    """Learn the mean and the standard deviation of each entry of A, and B, with one ELBO.

    All rows of a batch share one draw of the noise. Random signs per row make the rows nearly independent (Flipout, Wen
    et al., 2018), so the noise of the gradient falls with the batch size. A draw of the posterior is one matrix per
    layer. (The released code draws signs for each *token*, and uses a second optimizer for the KL.)

    Args:
        module: Base model. It is adapted in place.
        task: Task that encodes the rows and defines the likelihood.
        train_data: Training rows, as for :func:`scalabl_pyro.fit`.
        prior_scale: Standard deviation of the prior of each entry of A.
        init_root_scale: Square root of the largest initial standard deviation. The initial roots G are uniform on
            (init_root_scale / sqrt(2), init_root_scale).
        kl_weight: Weight of KL(q || p). 1 gives the ELBO. The schedule of the paper is
            ``KLReweighting(num_data=N, batch_size=B)``.
        lr: Learning rate of the means of A, of B and of the heads.
        lora: Options of :func:`scalabl_pyro.bayesian_lora`, such as ``r`` and ``target_modules``.
        seed: Seed of the initial roots, the data order and the noise.
        options: Options of :func:`scalabl_pyro.fit`, such as ``num_steps``. By default ``lr_A``, and ``lr_scale`` of
            the optimizer (the rate of the roots), are ``lr``.

    Returns:
        A result whose posterior draws A.

    Raises:
        ValueError: A scale is not positive and finite.
        TrainingError: The loss or gradient is not finite. ``result`` of the error holds what was learned before.

    References:
        Wang et al., BLoB, NeurIPS 2024, section 3.

    Example:
        >>> result = scalabl_pyro.baselines.blob(llm, task, train_data, num_steps=1000, kl_weight=0.1)
        >>> result.posterior.predict(test_data, num_draws=10).metrics()
    """
    check_scale(prior_scale=prior_scale, init_root_scale=init_root_scale)
    adapter = plain_lora(module, lora).adapter
    guide = NoiseGuide(adapter, init_root_scale=init_root_scale, seed=seed)
    blora = FlipoutLoRA(adapter, prior=NoisePrior(adapter, prior_scale))
    own = {} if options.keys() & {"lr_scale", "scale_lr"} else {"lr_scale": lr}  # given by a deprecated name
    optimizer = optimizer_with(options.pop("optimizer", None), **own)
    try:
        with unloaded_on_error(blora, lambda partial: _as_result(partial, prior_scale)):
            options = {"lr": lr, "lr_A": lr, "optimizer": optimizer, **options}
            result = fit(blora, task, train_data, guide=guide, kl_weight=kl_weight, seed=seed, **options)
    finally:  # fit left the mean of the noise there, which has another length
        adapter.rest_at(torch.ones(adapter.subspace.dim, dtype=adapter.factors()[0][0].dtype))
    return _as_result(result, prior_scale)


@dataclass(frozen=True)
class NormalNoise(WeightNoise):
    """Independent normal noise on the entries of A: A ~ Normal(M, scale).

    Attributes:
        scales: One tensor (r, in) of standard deviations per layer.

    Example:
        >>> scales = tuple(torch.full_like(A, 0.01) for A, _ in point.factors)
        >>> scalabl_pyro.baselines.FactorPosterior(point, scalabl_pyro.baselines.NormalNoise(scales)).sample(3)
    """

    family: ClassVar[str] = "normal"

    scales: tuple[Tensor, ...]

    def __repr__(self) -> str:
        low, high = (float(of(torch.stack([of(scale) for scale in self.scales]))) for of in (torch.min, torch.max))
        return f"NormalNoise(layers={len(self.scales)}, scales={low:.3g} to {high:.3g})"

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Yield factors with noise on A."""
        while True:
            yield tuple(
                (A + scale * torch.randn(A.shape, generator=generator, dtype=A.dtype), B)
                for (A, B), scale in zip(factors, self.scales, strict=True)
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the standard deviations of each layer."""
        return {f"scale_{i}": scale for i, scale in enumerate(self.scales)}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "NormalNoise":
        """Restore the noise."""
        scales = tuple(tensors[f"scale_{i}"] for i in range(len(factors)))
        for scale, (A, _) in zip(scales, factors, strict=True):
            if scale.shape != A.shape or not (scale >= 0).all():
                raise ValueError(
                    f"A saved scale must have the shape {tuple(A.shape)} and no negative entry, but it has the shape "
                    f"{tuple(scale.shape)} or a negative entry. The file is damaged or belongs to another model."
                )
        return cls(scales)


class NoiseGuide(Guide):
    """Guide q(E) = Normal(0, G^2) at the site ``"s"``, where E is the noise of all layers in one vector.

    Args:
        adapter: LoRA layers.
        init_root_scale: Largest initial G.
        seed: Seed of the initial G.
    """

    per_example = False  # Flipout makes the rows differ already

    def __init__(self, adapter: Adapter, *, init_root_scale: float, seed: int) -> None:
        super().__init__()
        self.root_scale = nn.Parameter(draw_initial_scale(flat(adapter), init_root_scale, seed=seed))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the noise."""
        scale = self.root_scale.square()
        return pyro.sample("s", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """Return zero noise."""
        return {"s": torch.zeros_like(self.root_scale)}


class NoisePrior(Prior):
    """Prior p(E) = Normal(-M, scale), which means A = M + E ~ Normal(0, scale).

    Args:
        adapter: LoRA layers. Their factors A are the means M.
        scale: Standard deviation of the prior of A.
    """

    def __init__(self, adapter: Adapter, scale: float) -> None:
        super().__init__()
        self._means = [
            A for A, _ in adapter.factors()
        ]  # a list, so that they are not parameters of the prior: they are trained as factors
        self.scale_of_A = scale

    def forward(self) -> Tensor:
        """Sample the noise."""
        device = self._means[0].device
        mean = torch.cat([A.reshape(-1).to(device) for A in self._means])
        scale = torch.full_like(mean, self.scale_of_A)  # on the device: a CUDA graph cannot copy from the host
        return pyro.sample("s", dist.Normal(-mean, scale).to_event(1))


class FlipoutLoRA(NoisyLoRA):
    """An adapted LLM whose site ``"s"`` is the noise of A. Each row multiplies it by its own random signs."""

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """Return E times an outer product of random signs for each row."""
        factors = self.adapter.factors()
        parts = s.split([A.numel() for A, _ in factors])
        return [
            RowNoise(part.view(A.shape).to(A.device), signs(A, rows, A.shape[1]), signs(A, rows, A.shape[0]))
            for part, (A, _) in zip(parts, factors, strict=True)
        ]


def signs(like: Tensor, *shape: int) -> Tensor:
    """Sample 1 or -1 with equal probability."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2).sub_(1)


def flat(adapter: Adapter) -> Tensor:
    """Return A of all layers in one vector on the CPU."""
    return torch.cat([A.detach().reshape(-1).cpu() for A, _ in adapter.factors()])


def _as_result(result: FitResult, prior_scale: float) -> BaselineResult:
    """Turn the posterior of E into a point posterior at M with noise around it."""
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
