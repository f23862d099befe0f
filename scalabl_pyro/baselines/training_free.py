"""TFB, training-free Bayesianisation: as much noise on a trained adapter as the data bear (Shi et al., NeurIPS 2025).

With B = U diag(d) V' the adapter is U diag(d) (V' A), and q gives entry (i, j) of V' A the standard deviation scale /
d_i: noise that is isotropic, of one scale, in the span of U. It is computed as U (diag(d) V' A + scale * noise), which
is the same function and divides by no singular value. The scale is the largest that leaves the NLL of anchor rows
within a tolerance of the trained adapter's.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Generator, Tensor

from .._errors import ScalaBLWarning, check_positive
from ..data.rows import read_rows
from ..lora.factors import Factors
from ..posterior.posterior import Posterior
from ..prediction.result import NumericPrediction, Prediction
from .factor_posterior import FactorNoise, FactorPosterior


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
    """Find the largest noise on a trained adapter that the NLL of anchor rows tolerates.

    The cost is ``num_bisections + 2`` predictions of the anchor rows under ``num_draws`` draws. All scales are tried
    with the same noise, so that the NLL is a smooth function of the scale. (The released code returns the smallest
    scale that it found to *violate* the tolerance, or the upper limit.)

    Args:
        posterior: of a trained adapter, such as ``baselines.mle(...).posterior``; of others, their mean is taken.
        anchor_data: labeled rows: the training data, or a part of them.
        tolerance: allowed rise of the NLL of the averaged probabilities, as a share of the NLL without noise.
        max_scale: largest scale that is tried.
        num_draws: draws behind each NLL.
        num_bisections: halvings of the interval from 0 to ``max_scale``.
        seed: of the noise.
        batch_size: rows a pass.

    Returns:
        A posterior over factors; its provenance holds the scale and the NLLs.

    Raises:
        ValueError: a tolerance or scale that is not positive, or rows without answers.
    """
    check_positive(num_draws=num_draws, num_bisections=num_bisections, tolerance=tolerance, max_scale=max_scale)
    rows = read_rows(anchor_data)

    def nll(scale: float) -> float:
        tried = FactorPosterior(posterior, SpectralNoise(scale))
        draws = num_draws if scale > 0 else 0
        return mixture_nll(tried.predict(rows, num_draws=draws, seed=seed, batch_size=batch_size))

    without = nll(0.0)
    scale = largest_passing(lambda s: nll(s) - without <= tolerance * abs(without), max_scale, num_bisections)
    if scale == max_scale or scale == 0:
        hint = f"raise max_scale={max_scale}" if scale else "raise tolerance, num_bisections or the number of rows"
        warnings.warn(f"The scale found, {scale}, is a limit of the search: {hint}.", ScalaBLWarning, stacklevel=2)
    provenance = {
        "method": "TFB",
        "scale": scale,
        "tolerance": tolerance,
        "anchor_nll": nll(scale),
        "anchor_nll_without_noise": without,
    }
    return FactorPosterior(posterior, SpectralNoise(scale), provenance)


@dataclass(frozen=True)
class SpectralNoise(FactorNoise):
    """Isotropic noise between the left singular vectors of B and the input.

    Attributes:
        scale: its standard deviation.
    """

    family: ClassVar[str] = "spectral"

    scale: float

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, float) and 0 <= self.scale < float("inf")):
            raise ValueError(f"scale={self.scale!r} must be a finite number that is not negative.")

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Factors (diag(d) V' A + scale * noise, U)."""
        turned = tuple(spectral_factors(A, B) for A, B in factors)
        while True:
            yield tuple(
                (A + self.scale * torch.randn(A.shape, generator=generator, dtype=A.dtype), U) for A, U in turned
            )

    def options(self) -> dict[str, Any]:
        """The scale."""
        return {"scale": self.scale}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "SpectralNoise":
        """The noise again."""
        return cls(**options)


def spectral_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(diag(d) V' A, U) with B = U diag(d) V', computed in float64."""
    Q, R = torch.linalg.qr(B.double())
    U, d, Vh = torch.linalg.svd(R)
    return ((d.unsqueeze(1) * Vh) @ A.double()).to(A.dtype), (Q @ U).to(B.dtype)


def largest_passing(passes: Callable[[float], bool], limit: float, num_bisections: int) -> float:
    """The largest number in [0, limit] that was seen to pass, by bisection; 0 passes.

    Args:
        passes: a test that once failed fails for all larger numbers.
        limit: tried first.
        num_bisections: the result is within limit / 2^num_bisections below the largest that passes.
    """
    if passes(limit):
        return limit
    low, high = 0.0, limit
    for _ in range(num_bisections):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def mixture_nll(prediction: Prediction | NumericPrediction) -> float:
    """NLL of the mixture of the draws, nats a row."""
    log_likelihood = prediction.log_likelihood.astype(np.float64)
    return float(-(logsumexp(log_likelihood, axis=0) - np.log(len(log_likelihood))).mean())
