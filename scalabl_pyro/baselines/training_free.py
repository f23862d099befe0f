"""TFB, training-free Bayesianization: the largest noise that a trained adapter tolerates (Shi et al., NeurIPS 2025).

With B = U diag(d) V' the adapter is U diag(d) (V' A). The posterior q gives entry (i, j) of V' A the standard deviation
scale / d_i. In the span of U this noise is isotropic. The code computes U (diag(d) V' A + scale * noise), which is the
same function but never divides by a singular value. The scale is the largest one whose NLL on anchor rows stays within
a tolerance of the NLL of the trained adapter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from .._arguments import check_role, known_arguments
from ..data.rows import rows_for
from ..inference.largest_scale import NoiseSearch
from ..lora.factors import Factors
from ..posterior.posterior import Posterior
from .factor_posterior import FactorPosterior, WeightNoise


@known_arguments
def tfb(
    posterior: Posterior,
    anchor_data: Any,
    *,
    tolerance: float = 0.003,
    max_scale: float = 0.2,
    num_draws: int = 10,
    num_bisections: int = 10,
    seed: int = 0,
    batch_size: int = 16,
) -> FactorPosterior:
    """Add the largest noise to a trained adapter that keeps the NLL of anchor rows within a tolerance.

    The cost is ``num_bisections + 2`` predictions of the anchor rows with ``num_draws`` draws each. Every scale is
    tried with the same random numbers, so the NLL is a smooth function of the scale. (The released code returns the
    smallest scale that *violates* the tolerance, or the upper limit.)

    Args:
        posterior: Posterior of a trained adapter, such as ``baselines.mle(...).posterior``. Only its mean is used.
        anchor_data: Labeled rows: the training data or a part of it.
        tolerance: Allowed increase of the NLL of the averaged probabilities, relative to the NLL without noise.
        max_scale: Largest scale of the search.
        num_draws: Number of draws for each NLL.
        num_bisections: Number of times the interval from 0 to ``max_scale`` is halved.
        seed: Seed of the noise.
        batch_size: Rows per forward pass.

    Returns:
        A posterior of the factors. Its provenance holds the scale and the NLLs.

    Raises:
        ValueError: The tolerance or ``max_scale`` is not positive, or rows have no answers.

    References:
        Shi et al., Training-Free Bayesianization for Low-Rank Adapters, NeurIPS 2025.

    Example:
        >>> posterior = scalabl_pyro.baselines.tfb(point, train_data, tolerance=0.003)
        >>> posterior.provenance["scale"], posterior.predict(test_data).metrics()
    """
    check_role("posterior", posterior, "posterior", call="tfb(posterior, anchor_data)")
    posterior.task.check_use("baselines.tfb()")
    search = NoiseSearch(
        tolerance=tolerance,
        max_scale=max_scale,
        num_draws=num_draws,
        num_bisections=num_bisections,
        seed=seed,
        batch_size=batch_size,
    )
    rows = rows_for(posterior.task.encode, anchor_data)
    provenance = search.provenance(lambda scale: FactorPosterior(posterior, SpectralNoise(scale)), rows)
    return FactorPosterior(posterior, SpectralNoise(provenance["scale"]), provenance)


@dataclass(frozen=True)
class SpectralNoise(WeightNoise):
    """Isotropic normal noise on the input side of the left singular vectors of B.

    Attributes:
        scale: Standard deviation of the noise.

    Example:
        >>> noise = scalabl_pyro.baselines.SpectralNoise(0.01)
        >>> scalabl_pyro.baselines.FactorPosterior(point, noise).predict(test_data, num_draws=10)
    """

    family: ClassVar[str] = "spectral"

    scale: float

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, float) and 0 <= self.scale < float("inf")):
            raise ValueError(f"scale={self.scale!r} must be a finite float, 0 or more.")

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Yield the factors (diag(d) V' A + scale * noise, U)."""
        turned = tuple(spectral_factors(A, B) for A, B in factors)
        while True:
            yield tuple(
                (A + self.scale * torch.randn(A.shape, generator=generator, dtype=A.dtype), U) for A, U in turned
            )

    def options(self) -> dict[str, Any]:
        """Return the scale."""
        return {"scale": self.scale}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "SpectralNoise":
        """Restore the noise."""
        return cls(**options)


def spectral_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (diag(d) V' A, U), where B = U diag(d) V'; computed in float64."""
    Q, R = torch.linalg.qr(B.double())
    U, d, Vh = torch.linalg.svd(R)
    return ((d.unsqueeze(1) * Vh) @ A.double()).to(A.dtype), (Q @ U).to(B.dtype)
