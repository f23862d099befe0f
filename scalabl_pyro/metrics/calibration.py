"""Calibration: does the model answer right as often as its confidence, its largest probability, says?"""

from typing import Literal, get_args

import numpy as np
import pandas as pd

from .._arguments import known_arguments
from .._errors import check_choice, check_count
from .arrays import Array, Labels, confidence_and_correct
from .intervals import check_level, wilson

Bins = Literal["width", "mass"]
"""Words for bins of the confidence: of equal width, or of equal numbers of rows."""

NUM_BINS = 15


@known_arguments
def ece(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> float:
    """Compute the expected calibration error of the top probability over equal-width bins (Guo et al., 2017, eq. 3)."""
    return _gap(reliability(probs, labels, num_bins=num_bins))


@known_arguments
def adaptive_ece(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> float:
    """Compute the expected calibration error over bins of equal counts, none of them empty (Nixon et al., 2019).

    Rows of equal confidence share their accuracy: each of them has the mean accuracy of all. So the result does not
    depend on the bins into which they fall. Confidences that agree to 6 digits count as equal.
    """
    return _gap(reliability(probs, labels, num_bins=num_bins, bins="mass"))


@known_arguments
def reliability(
    probs: Array, labels: Labels, *, num_bins: int = NUM_BINS, bins: Bins = "width", level: float = 0.95
) -> pd.DataFrame:
    """Make a table of confidence and accuracy, one line per bin of the top probability. Empty bins are left out.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        num_bins: Number of bins.
        bins: ``"width"`` for bins of equal width, as in :func:`ece`, or ``"mass"`` for bins of equal numbers of rows,
            as in :func:`adaptive_ece`.
        level: Coverage of the intervals, between 0 and 1.

    Returns:
        Columns ``confidence`` (mean top probability of the rows in the bin), ``accuracy`` (share of right rows),
        ``count`` (number of rows), and ``low`` and ``high``, the Wilson score interval of the accuracy (Wilson, 1927).
        It holds for rows that are independent.

    Raises:
        ValueError: If the shapes, the probabilities or the labels are wrong, or if an option is out of range.

    Example:
        >>> table = reliability(np.array([[0.8, 0.2], [0.7, 0.3]]), np.array([0, 1]), num_bins=1)
        >>> table[["accuracy", "count", "low", "high"]].round(2).to_numpy().tolist()
        [[0.5, 2.0, 0.09, 0.91]]
    """
    check_count(num_bins=num_bins)
    check_choice("bins", bins, get_args(Bins))
    check_level(level)
    confidence, correct = confidence_and_correct(probs, labels)
    right = correct.astype(float)
    if bins == "width":
        place = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    else:
        confidence, right = _in_order(confidence, right)
        parts = np.array_split(np.arange(len(right)), min(num_bins, len(right)))
        place = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    grouped = pd.DataFrame({"bin": place, "confidence": confidence, "accuracy": right}).groupby("bin")
    table = grouped.mean().assign(count=grouped.size())
    low, high = wilson(table["accuracy"].to_numpy(), table["count"].to_numpy(), level)
    return table.assign(low=low, high=high)


def _in_order(confidence: Array, right: Array) -> tuple[Array, Array]:
    """Sort rows by confidence, and give rows of equal confidence the mean of both numbers."""
    _, tie = np.unique(confidence.round(6), return_inverse=True)  # float32 rounds equal probabilities apart
    count, order = np.bincount(tie), np.sort(tie)
    confidence, right = (np.bincount(tie, value)[order] / count[order] for value in (confidence, right))
    return confidence, right


def _gap(table: pd.DataFrame) -> float:
    """Compute the mean distance of confidence and accuracy over the bins, weighted with their counts."""
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((table["count"] * gaps).sum() / table["count"].sum())
