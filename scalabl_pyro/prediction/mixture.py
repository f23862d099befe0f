"""Mixtures over draws: log density, entropy without the bias of few draws, and quantiles of normal mixtures."""

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri

from ..metrics import Array, entropy

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


def log_mean_exp(log_densities: Array) -> Array:
    """Compute the log density (N,) of the mixture of S draws from those of each draw (S, N), nats, in float64.

    Densities below the smallest float are no problem: the result is -inf only where all draws rule the answer out.

    Example:
        >>> import numpy as np
        >>> log_mean_exp(np.array([[-2000.0], [-2000.0]]))
        array([-2000.])
    """
    return logsumexp(np.asarray(log_densities, dtype=np.float64), axis=0) - np.log(len(log_densities))


def jackknife_entropy(probs: Array) -> Array:
    """Estimate the entropy of the mean of a distribution of probabilities from S draws of it, by the jackknife.

    The entropy of the average of S draws is biased low by a term of order 1 / S. The jackknife removes this term:
    S H(all draws) - (S - 1) mean_i H(all draws but i).

    Args:
        probs: (S, N, C) probabilities under each draw.

    Returns:
        (N,) entropies, nats; NaN for one draw.

    References:
        Quenouille, Notes on bias in estimation, Biometrika 1956; Zahl, Jackknifing an index of diversity, Ecology 1977.
    """
    count = len(probs)
    if count < 2:
        return np.full(probs.shape[1], np.nan)
    mean = probs.mean(0)
    left_out = np.stack([entropy(np.maximum(count * mean - one, 0.0) / (count - 1)) for one in probs])
    return count * entropy(mean) - (count - 1) * left_out.mean(0)
