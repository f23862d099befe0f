"""The largest noise that keeps a loss: search by bisection, and the loss of averaged draws."""

from collections.abc import Callable

from ..prediction.mixture import log_mean_exp
from ..prediction.result import NumericPrediction, Prediction


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


def mixture_nll(prediction: Prediction | NumericPrediction) -> float:
    """Return the NLL of the mixture of the draws, in nats per row."""
    return float(-log_mean_exp(prediction.with_answers().log_likelihood).mean())
