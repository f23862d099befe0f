"""The largest noise that keeps a loss: the search of TFB, for noise on s and for noise on the factors."""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .._errors import ScalaBLWarning, check_count, check_positive, check_scale, stacklevel_outside
from ..posterior.posterior import Posterior
from ..prediction.mixture import log_mean_exp
from ..prediction.result import NumericPrediction, Prediction
from ..prediction.scored_texts import ScoredTexts


class Predicts(Protocol):
    """A posterior of either kind."""

    def predict(self, data: Any, *, num_draws: int, seed: int, batch_size: int) -> Any:
        """Predict rows with some draws."""


@dataclass(frozen=True, kw_only=True)
class NoiseSearch:
    """Search for the largest scale of a noise under which the NLL of some rows stays within a tolerance.

    Every scale is tried with the same random numbers, so the NLL is a smooth function of the scale.

    Attributes:
        tolerance: Allowed increase of the NLL of the averaged probabilities, relative to the NLL without noise.
        max_scale: Largest scale to try.
        num_draws: Number of draws for each NLL.
        num_bisections: Number of times the interval from 0 to ``max_scale`` is halved.
        seed: Seed of the noise.
        batch_size: Rows per forward pass.

    Raises:
        ValueError: An option is out of range.

    References:
        Shi et al., Training-Free Bayesianization for Low-Rank Adapters, NeurIPS 2025, section 3.2.
    """

    tolerance: float = 0.003
    max_scale: float = 1.0
    num_draws: int = 4
    num_bisections: int = 6
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_count(num_draws=self.num_draws, num_bisections=self.num_bisections)
        check_positive(tolerance=self.tolerance)
        check_scale(max_scale=self.max_scale)

    def provenance(self, with_noise: Callable[[float], Predicts], rows: Any) -> dict[str, Any]:
        """Search, and return method, scale, tolerance, and the NLLs of the rows at this scale and without noise.

        Args:
            with_noise: Returns the posterior with noise of a scale. At scale 0 it is the adapter itself.
            rows: Labeled rows.
        """

        @functools.cache
        def nll(scale: float) -> float:
            draws = self.num_draws if scale > 0 else 0
            options = {"num_draws": draws, "seed": self.seed, "batch_size": self.batch_size}
            return mixture_nll(answered(with_noise(scale), rows, options))

        limit = nll(0.0) + self.tolerance * abs(nll(0.0))
        scale = largest_passing(lambda tried: nll(tried) <= limit, self.max_scale, self.num_bisections)
        if scale in (0.0, self.max_scale):
            found = f"The NLL stays within the tolerance up to the largest scale, {scale}: raise max_scale."
            none = (
                "Each scale that was tried raises the NLL by more than the tolerance, so the posterior has no noise: "
                "raise tolerance, num_bisections or the number of rows."
            )
            warnings.warn(found if scale else none, ScalaBLWarning, stacklevel=stacklevel_outside())
        return {
            "method": "TFB",
            "scale": scale,
            "tolerance": self.tolerance,
            "anchor_nll": nll(scale),
            "anchor_nll_without_noise": nll(0.0),
        }


def largest_passing(passes: Callable[[float], bool], limit: float, num_bisections: int) -> float:
    """Find the largest number in [0, limit] that passes a test, by bisection. 0 is assumed to pass.

    Args:
        passes: Test that fails for all numbers above some threshold.
        limit: Upper limit. It is tried first.
        num_bisections: Number of bisections. The result lies at most limit / 2^num_bisections below the threshold.
    """
    if passes(limit):
        return limit
    low, high = 0.0, limit
    for _ in range(num_bisections):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def answered(
    posterior: Predicts, rows: Any, options: Mapping[str, Any]
) -> Prediction | NumericPrediction | ScoredTexts:
    """Return what a posterior says of rows with answers: a prediction, or the scores of completions."""
    if isinstance(posterior, Posterior) and posterior.task.scores_only:
        return posterior.score(rows, **options)
    prediction: Prediction | NumericPrediction = posterior.predict(rows, **options)
    return prediction.with_answers()


def mixture_nll(found: Prediction | NumericPrediction | ScoredTexts) -> float:
    """Return the NLL of the mixture of the draws, in nats per row."""
    return float(-log_mean_exp(found.log_likelihood).mean())
