"""Scores of doubt: which rows are wrong, which come from elsewhere, and what is gained by leaving rows to a person."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .._arguments import known_arguments
from .._errors import is_number
from .._probabilities import as_scores
from .arrays import Array, Labels, confidence_and_correct
from .scores import entropy


@known_arguments
def auroc(score: Array, positive: NDArray[np.bool_]) -> float:
    """Compute the probability that a positive row scores above a negative row; NaN when one kind is missing.

    Raises:
        ValueError: If the shapes differ, a score is NaN, or ``positive`` holds more than True and False.
    """
    from scipy.stats import rankdata
    from torchmetrics.functional.classification import binary_auroc

    score, positive = as_scores(score, positive)
    if positive.all() or not positive.any():
        return float("nan")
    ranks = rankdata(score) / len(positive)  # torchmetrics reads scores outside of [0, 1] as logits
    return binary_auroc(torch.as_tensor(ranks), torch.as_tensor(positive).long()).item()


@known_arguments
def error_auroc(probs: Array, labels: Labels) -> float:
    """Compute the AUROC of the entropy of the prediction for telling wrong rows from right rows."""
    _, correct = confidence_and_correct(probs, labels)
    return auroc(entropy(probs), ~correct)


@known_arguments
def ood_auroc(inside: Array, outside: Array) -> float:
    """Compute the AUROC of an uncertainty score (higher = less certain) for detecting out-of-distribution rows."""
    scores = [np.asarray(inside), np.asarray(outside)]
    if any(score.ndim != 1 or len(score) == 0 for score in scores):
        raise ValueError(f"The scores have shapes {scores[0].shape} and {scores[1].shape}: expected (N,) and (M,).")
    return auroc(np.concatenate(scores), np.repeat([False, True], [len(score) for score in scores]))


@known_arguments
def risk_coverage(probs: Array, labels: Labels, *, uncertainty: Array | None = None) -> tuple[Array, Array]:
    """Compute coverage (share answered) and risk (error among the answered), most certain rows first.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        uncertainty: (N,) score that orders the rows, higher = less certain; None for 1 - maximum probability.

    Returns:
        (N,) coverages and (N,) risks.

    Raises:
        ValueError: If the uncertainty has another shape, or if it is not finite.
    """
    confidence, correct = confidence_and_correct(probs, labels)
    score = -confidence if uncertainty is None else np.asarray(uncertainty)
    if score.shape != correct.shape or not np.isfinite(score).all():
        raise ValueError(f"uncertainty has shape {score.shape}: expected {correct.shape}, one finite number per row.")
    order = np.argsort(score, kind="stable")
    _, tie = np.unique(score[order], return_inverse=True)
    wrong = ~correct[order]
    share = (np.bincount(tie, wrong) / np.bincount(tie))[tie]  # rows that tie are answered in random order
    answered = np.arange(1, len(wrong) + 1)
    return answered / len(wrong), np.minimum(np.cumsum(share) / answered, 1.0)


@known_arguments
def aurc(probs: Array, labels: Labels, *, uncertainty: Array | None = None) -> float:
    """Compute the area under :func:`risk_coverage`; lower is better (Geifman and El-Yaniv, 2017)."""
    return float(risk_coverage(probs, labels, uncertainty=uncertainty)[1].mean())


class ConfidentMistakes(NamedTuple):
    """How many rows are answered with a high probability, and how many of these answers are wrong.

    Attributes:
        mistakes: Number of confident answers that are wrong.
        confident: Number of rows whose largest probability is above the threshold.
        rows: Number N of all rows.
    """

    mistakes: int
    confident: int
    rows: int


@known_arguments
def confident_mistakes(probs: Array, labels: Labels, *, threshold: float = 0.9) -> ConfidentMistakes:
    """Count the rows that are answered with a probability above a threshold, and wrong.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        threshold: Probability that an answer must exceed to count as confident, from 0 up to, but not including, 1.

    Returns:
        Number of mistakes, number of confident answers, and number of rows.

    Raises:
        ValueError: If the shapes, the probabilities or the labels are wrong, or if the threshold is out of range.

    Example:
        >>> confident_mistakes(np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4]]), np.array([0, 1, 1]))
        ConfidentMistakes(mistakes=1, confident=2, rows=3)
    """
    if not is_number(threshold) or not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold!r} must be a probability: 0 or more, and below 1.")
    confidence, correct = confidence_and_correct(probs, labels)
    sure = confidence > threshold
    return ConfidentMistakes(int((sure & ~correct).sum()), int(sure.sum()), len(sure))
