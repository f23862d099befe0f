"""Accuracy, calibration and uncertainty metrics: pure functions of probabilities (N, C) and labels (N,).

Every function refuses shapes that do not fit, logits, percentages, NaN, and labels outside of the classes.
Proportions and errors lie in [0, 1]; log losses are in nats. Accuracy and AUROC come from torchmetrics. Its calibration
error is not used: it gives p = 1 a bin of its own, and reads all rows as logits when rounding lifts one value above 1.

Example:
    >>> probs, labels = np.array([[0.8, 0.2], [0.4, 0.6]]), np.array([0, 0])
    >>> accuracy(probs, labels), round(nll(probs, labels), 3), round(brier(probs, labels), 2)
    (0.5, 0.57, 0.4)
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy

from ._arguments import known_arguments
from ._errors import check_count
from ._probabilities import as_probabilities, as_scores, check_probabilities

__all__ = [
    "accuracy",
    "adaptive_ece",
    "aurc",
    "auroc",
    "brier",
    "classification_report",
    "ece",
    "entropy",
    "error_auroc",
    "nll",
    "ood_auroc",
    "reliability",
    "report",
    "risk_coverage",
]

Array = NDArray[Any]
"""Array of numbers."""
Labels = NDArray[np.integer]
"""Class indices (N,)."""

NUM_BINS = 15


@known_arguments
def accuracy(probs: Array, labels: Labels) -> float:
    """Compute the share of rows whose most probable class is the label; higher is better."""
    probs, labels = as_probabilities(probs, labels)
    p, y = torch.as_tensor(probs), torch.as_tensor(labels)
    return multiclass_accuracy(p.argmax(1), y, num_classes=p.shape[1], average="micro").item()


@known_arguments
def nll(probs: Array, labels: Labels) -> float:
    """Compute the mean negative log probability of the label, nats; lower is better.

    It is infinite where a label has probability 0. A probability below about 1e-308 is 0 as a float:
    ``prediction.metrics()`` computes the NLL from log probabilities, which have no such limit.
    """
    probs, labels = as_probabilities(probs, labels)
    with np.errstate(divide="ignore"):
        return _mean_nll(np.log(probs[np.arange(len(labels)), labels].astype(np.float64)))


@known_arguments
def ece(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> float:
    """Compute the expected calibration error of the top probability over equal-width bins (Guo et al., 2017, eq. 3)."""
    table = reliability(probs, labels, num_bins=num_bins)
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((table["count"] * gaps).sum() / table["count"].sum())


@known_arguments
def adaptive_ece(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> float:
    """Compute the expected calibration error over bins of equal counts, none of them empty (Nixon et al., 2019).

    Rows of equal confidence share their accuracy: each counts as right by the share of right rows among them. So the
    result does not depend on which of them fall into which bin. Confidences that agree to 6 digits count as equal.
    """
    confidence, correct = _confidence(probs, labels)
    _, tie = np.unique(confidence.round(6), return_inverse=True)  # float32 rounds equal probabilities apart
    count, order = np.bincount(tie), np.sort(tie)
    confidence, right = (np.bincount(tie, value)[order] / count[order] for value in (confidence, correct))
    bins = np.array_split(np.arange(len(tie)), min(num_bins, len(tie)))
    return float(sum(len(b) * abs(confidence[b].mean() - right[b].mean()) for b in bins) / len(tie))


@known_arguments
def brier(probs: Array, labels: Labels) -> float:
    """Compute the mean squared distance to the one-hot label: 0 is best, 2 is worst (Brier, 1950)."""
    probs, labels = as_probabilities(probs, labels)
    onehot = np.eye(probs.shape[1])[labels]
    return float(((probs - onehot) ** 2).sum(1).mean())


@known_arguments
def auroc(score: Array, positive: NDArray[np.bool_]) -> float:
    """Compute the probability that a positive row scores above a negative row; NaN when one kind is missing.

    Raises:
        ValueError: If the shapes differ, a score is NaN, or ``positive`` holds more than True and False.
    """
    score, positive = as_scores(score, positive)
    if positive.all() or not positive.any():
        return float("nan")
    ranks = rankdata(score) / len(positive)  # torchmetrics reads scores outside of [0, 1] as logits
    return binary_auroc(torch.as_tensor(ranks), torch.as_tensor(positive).long()).item()


@known_arguments
def error_auroc(probs: Array, labels: Labels) -> float:
    """Compute the AUROC of the entropy of the prediction for telling wrong rows from right rows."""
    _, correct = _confidence(probs, labels)
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
    confidence, correct = _confidence(probs, labels)
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


@known_arguments
def entropy(probs: Array) -> Array:
    """Compute the entropy of each row, (N,), nats; probabilities (..., N, C) give (..., N)."""
    probs = np.asarray(probs)
    check_probabilities(probs)
    safe = np.where(probs > 0, probs, 1.0)
    return -(probs * np.log(safe)).sum(-1)


CLASSIFICATION: dict[str, Callable[[Array, Labels], float]] = {
    "accuracy": accuracy,
    "nll": nll,
    "ece": ece,
    "adaptive_ece": adaptive_ece,
    "brier": brier,
    "error_auroc": error_auroc,
    "aurc": aurc,
}


#: Metrics without bootstrap intervals. Noise alone makes a calibration error positive, and a resample adds noise, so
#: nearly all resamples lie above the value: a percentile interval would not contain it.
WITHOUT_INTERVAL = ("ece", "adaptive_ece")


@known_arguments
def classification_report(
    probs: Array,
    labels: Labels,
    *,
    log_likelihood: Array | None = None,
    bootstrap: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute all metrics of a classification.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        log_likelihood: (N,) log probability of each label, nats, for an NLL that holds where probabilities are too
            small for floats; None for the logarithm of ``probs``.
        bootstrap: Number of resamples of the rows for percentile intervals (Efron, 1979); 0 for none.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the resampling.

    Returns:
        Row ``value``, and with ``bootstrap`` also ``low`` and ``high``; one column per metric. The bounds of ``ece``
        and ``adaptive_ece`` are NaN: both are biased upward, and more so in a resample, so that a percentile interval
        would lie above the value itself.

    Raises:
        ValueError: If the shapes, the probabilities or the labels are wrong, or if an option is out of range.
    """
    probs, labels = as_probabilities(probs, labels)

    def scores(rows: NDArray[np.integer] | slice) -> dict[str, float]:
        values = {name: fn(probs[rows], labels[rows]) for name, fn in CLASSIFICATION.items()}
        if log_likelihood is not None:
            values["nll"] = _mean_nll(log_likelihood[rows])
        return values

    table = report(scores, len(labels), bootstrap=bootstrap, level=level, seed=seed)
    table.loc[table.index != "value", list(WITHOUT_INTERVAL)] = np.nan
    return table


@known_arguments
def report(
    scores: Callable[[Any], dict[str, float]], num_rows: int, *, bootstrap: int = 0, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Score all rows, and resamples of the rows for percentile intervals.

    Args:
        scores: Function from row indices (or a slice) to metrics by name.
        num_rows: Number N of rows.
        bootstrap: Number of resamples (Efron, 1979); 0 for none.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the resampling.

    Returns:
        Row ``value``, and with ``bootstrap`` also ``low`` and ``high``; one column per metric.

    Raises:
        ValueError: If ``bootstrap`` is not a whole number from 0 on, or if ``level`` is not between 0 and 1.
    """
    check_count(bootstrap=bootstrap, least=0)
    check_level(level)
    table: dict[str, Any] = {"value": scores(slice(None))}
    if bootstrap:
        picks = np.random.default_rng(seed).integers(num_rows, size=(bootstrap, num_rows))
        resamples = pd.DataFrame([scores(rows) for rows in picks])
        tails = (("low", (1 - level) / 2), ("high", (1 + level) / 2))
        table |= {name: {k: _quantile(resamples[k].to_numpy(), p) for k in resamples} for name, p in tails}
    return pd.DataFrame.from_dict(table, orient="index")


def check_level(level: float) -> None:
    """Raise ValueError unless a coverage lies between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")


@known_arguments
def reliability(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Make a table of ``confidence``, ``accuracy`` and ``count`` of each non-empty bin of the top probability."""
    confidence, correct = _confidence(probs, labels)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    frame = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct.astype(float)})
    grouped = frame.groupby("bin")
    return grouped.mean().assign(count=grouped.size())


def _quantile(values: Array, p: float) -> float:
    """The quantile of values without NaN. Where some are infinite it is one of them: they cannot be interpolated."""
    known = np.sort(values[~np.isnan(values)])
    if len(known) == 0:
        return float("nan")
    if np.isinf(known).any():
        place = p * (len(known) - 1)
        return float(known[int(np.floor(place) if p < 0.5 else np.ceil(place))])
    return float(np.quantile(known, p))


def _mean_nll(log_likelihood: Array) -> float:
    return float(0.0 - np.asarray(log_likelihood, dtype=np.float64).mean())


def _confidence(probs: Array, labels: Labels) -> tuple[Array, NDArray[np.bool_]]:
    probs, labels = as_probabilities(probs, labels)
    return probs.max(1), probs.argmax(1) == labels
