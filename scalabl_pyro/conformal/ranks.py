"""The rank of the calibration score that becomes the threshold, and the law of the coverage that it gives."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import stats

from .._arguments import known_arguments
from .._errors import check_count
from ..metrics import Array, check_level


def rank(num_rows: int, level: float) -> int:
    """Return k = ceil((n + 1) level). The decimal digits of ``level`` count, not its rounded binary value."""
    return math.ceil((num_rows + 1) * Fraction(repr(float(level))))


def least_rows(level: float) -> int:
    """Return the smallest number of calibration rows that gives a finite threshold: level / (1 - level), rounded up."""
    exact = Fraction(repr(float(level)))
    return math.ceil(exact / (1 - exact))


def threshold(scores: Array, level: float, *, what: str = "") -> float:
    """Return the k-th smallest of n scores, k = ceil((n + 1) level).

    Args:
        scores: (n,) scores of calibration rows; higher means that the right answer conforms less.
        level: Wanted coverage.
        what: Which rows these are, for the message.

    Raises:
        ValueError: There are too few scores for the level.
    """
    if len(scores) < (needed := least_rows(level)):
        raise ValueError(
            f"level={level} needs {needed} calibration rows with answers{what}, and there are {len(scores)}. Give "
            f"more rows, or a level of at most {len(scores) / (len(scores) + 1):.4g}."
        )
    return float(np.sort(scores)[rank(len(scores), level) - 1])


@known_arguments
def coverage_law(num_rows: int, level: float) -> Any:
    """Return the distribution of the coverage over calibration sets, Beta(k, n + 1 - k) with k = ceil((n + 1) level).

    The coverage is the share of all new rows whose set or interval holds the right answer, for one calibration set.
    The law is exact if no two scores tie. With ties the coverage is larger.

    Args:
        num_rows: Number n of calibration rows.
        level: Wanted coverage, between 0 and 1.

    Returns:
        A frozen ``scipy.stats.beta``.

    Raises:
        ValueError: The level is out of range, or there are too few rows for it.

    Example:
        >>> [float(end.round(3)) for end in coverage_law(500, 0.9).interval(0.9)]
        [0.877, 0.921]

    References:
        Vovk, Conditional Validity of Inductive Conformal Predictors, 2012, proposition 2a.
    """
    check_level(level)
    check_count(num_rows=num_rows)
    if num_rows < least_rows(level):
        raise ValueError(f"level={level} needs {least_rows(level)} calibration rows, got num_rows={num_rows}.")
    k = rank(num_rows, level)
    return stats.beta(k, num_rows + 1 - k)


def coverage_in_words(num_rows: int, level: float) -> str:
    """Say between which values the coverage lies for most calibration sets of this size."""
    low, high = coverage_law(num_rows, level).interval(0.9)
    return (
        f"This probability is over calibration rows and new row together. For one set of {num_rows} calibration rows, "
        f"the coverage of new rows is between {low:.3f} and {high:.3f} in 90 % of all cases (if no scores tie)."
    )
