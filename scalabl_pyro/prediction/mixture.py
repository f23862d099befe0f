"""Quantiles of a mixture of normal distributions."""

import numpy as np
from scipy.special import ndtr, ndtri

from ..metrics import Array

#: Halvings of the bracket around a quantile: more than float64 can tell apart.
STEPS = 100


def normal_mixture_quantiles(means: Array, variances: Array, p: float) -> Array:
    """Solve mean_s Phi((x - mean_s) / sd_s) = p for x by bisection.

    The quantile of a mixture lies between the smallest and the largest quantile of its components.

    Args:
        means: (S, N) means of the components.
        variances: (S, N) variances of the components.
        p: Probability below the quantile, between 0 and 1.

    Returns:
        (N,) quantiles, float64.

    Example:
        >>> import numpy as np
        >>> normal_mixture_quantiles(np.array([[-1.0], [1.0]]), np.ones((2, 1)), 0.5).round(6) + 0.0
        array([0.])
    """
    center = np.asarray(means, dtype=np.float64)
    scale = np.maximum(np.sqrt(np.asarray(variances, dtype=np.float64)), np.finfo(np.float64).tiny)
    of_components = center + scale * ndtri(p)
    low, high = of_components.min(0), of_components.max(0)
    for _ in range(STEPS):
        middle = low + (high - low) / 2
        is_below = ndtr((middle - center) / scale).mean(0) < p
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return low + (high - low) / 2
