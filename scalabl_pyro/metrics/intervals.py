"""Intervals of a share of rows, and of resampled metrics."""

import numpy as np
from scipy.special import ndtri

from .._errors import is_number
from .arrays import Array


def check_level(level: float) -> None:
    """Raise ValueError unless a coverage lies between 0 and 1."""
    if not is_number(level) or not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie between 0 and 1.")


def wilson(share: Array, count: Array, level: float) -> tuple[Array, Array]:
    """Compute the Wilson score interval of a probability from an observed share (Wilson, 1927).

    The interval stays in [0, 1] and has a width at shares of 0 and 1. Brown, Cai and DasGupta (2001) recommend it for
    small counts. SciPy's ``binomtest(...).proportion_ci(method="wilson")`` takes one whole number of successes at a
    time; rows that tie make the number of right rows in a bin a fraction here.

    Args:
        share: (B,) observed shares.
        count: (B,) numbers of rows that they were observed in.
        level: Coverage of the intervals, between 0 and 1.

    Returns:
        (B,) lower and (B,) upper bounds.
    """
    z2 = ndtri((1 + level) / 2) ** 2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return np.clip(center - half, 0, share), np.clip(center + half, share, 1)


def quantile(values: Array, p: float) -> float:
    """Compute the quantile of the values that are not NaN.

    If some are infinite, it is one of the values, because infinite numbers cannot be interpolated.
    """
    known = np.sort(values[~np.isnan(values)])
    if len(known) == 0:
        return float("nan")
    if np.isinf(known).any():
        place = p * (len(known) - 1)
        return float(known[int(np.floor(place) if p < 0.5 else np.ceil(place))])
    return float(np.quantile(known, p))
