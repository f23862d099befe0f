"""Checks of what metrics are computed from: probabilities, labels and scores."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def as_probabilities(probs: Array, labels: NDArray[np.integer]) -> tuple[Array, NDArray[np.integer]]:
    """Return probabilities and labels as arrays.

    Raises:
        ValueError: The shapes, the probabilities or the labels are wrong.
    """
    probs, labels = np.asarray(probs), np.asarray(labels)
    if probs.ndim != 2 or labels.ndim != 1 or len(probs) != len(labels) or len(labels) == 0:
        binary = " For probabilities p of class 1, pass np.stack([1 - p, p], axis=1)." if probs.ndim == 1 else ""
        raise ValueError(
            f"probs has shape {probs.shape}, labels {labels.shape}: expected (N, C) and (N,) with N >= 1.{binary}"
        )
    check_probabilities(probs)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Labels must be integers (class indices), got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        unknown = " Leave out rows whose label is not known (-1)." if labels.min() == -1 else ""
        raise ValueError(
            f"Labels must lie in 0 to {probs.shape[1] - 1}, got {labels.min()} to {labels.max()}.{unknown}"
        )
    return probs, labels


def check_probabilities(probs: Array) -> None:
    """Raise ValueError unless the last axis holds probabilities."""
    if probs.ndim < 1 or not np.issubdtype(probs.dtype, np.number) or np.iscomplexobj(probs):
        raise ValueError(
            f"probs must hold real numbers in an axis of classes, got {probs.dtype} of shape {probs.shape}."
        )
    sums = probs.sum(-1)
    if (probs >= -1e-6).all() and (np.abs(sums - 1) <= 1e-3).all():
        return
    if np.isnan(probs).any():
        advice = "Some are NaN: leave these rows out."
    elif (probs < 0).any():
        advice = "Some are negative: these look like logits or log probabilities. Apply softmax first."
    elif (np.abs(sums - 100) <= 1).all():
        advice = "They sum to 100: divide percentages by 100."
    else:
        advice = f"The sums lie between {sums.min():.4g} and {sums.max():.4g}."
    raise ValueError(f"Each row of probs must be finite, not negative, and sum to 1. {advice}")


def as_scores(score: Array, positive: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return scores and truth values as arrays.

    Raises:
        ValueError: The shapes differ, a score is NaN, or ``positive`` holds more than True and False (or 1 and 0).
    """
    score, positive = np.asarray(score), np.asarray(positive)
    if score.ndim != 1 or score.shape != positive.shape or len(score) == 0:
        raise ValueError(f"score has shape {score.shape}, positive {positive.shape}: expected (N,) and (N,), N >= 1.")
    if np.isnan(score).any():
        raise ValueError(f"The scores of rows {np.flatnonzero(np.isnan(score))[:5].tolist()} are NaN: leave them out.")
    if not np.isin(positive, (0, 1)).all():
        raise ValueError("positive must hold True and False, one per row.")
    return score, positive.astype(bool)
