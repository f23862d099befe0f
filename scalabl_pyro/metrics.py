"""Accuracy, calibration and uncertainty metrics: pure functions of probabilities (N, C) and labels (N,).

Proportions and errors are in [0, 1], log losses in nats. Accuracy and AUROC are torchmetrics'. Its calibration error
is not used: it gives p = 1 a bin of its own, and takes all rows for logits when rounding lifts one value above 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy

Array = NDArray[np.floating]
Labels = NDArray[np.integer]

NUM_BINS = 15


def accuracy(probs: Array, labels: Labels) -> float:
    """Share of rows whose most probable class is the label; higher is better."""
    p, y = torch.as_tensor(np.asarray(probs)), torch.as_tensor(np.asarray(labels))
    return multiclass_accuracy(p.argmax(1), y, num_classes=p.shape[1], average="micro").item()


def nll(probs: Array, labels: Labels) -> float:
    """Mean negative log probability of the label, nats; lower is better."""
    probs, labels = np.asarray(probs), np.asarray(labels)
    chosen = probs[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())


def ece(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error of the top probability over equal-width bins (Guo et al., 2017, eq. 3)."""
    table = reliability(probs, labels, num_bins=num_bins)
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((table["count"] * gaps).sum() / table["count"].sum())


def adaptive_ece(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error over bins of equal counts, which no empty bin distorts (Nixon et al., 2019)."""
    confidence, correct = _confidence(probs, labels)
    order = np.lexsort((correct, confidence))  # ties in a fixed order
    bins = np.array_split(order, min(num_bins, len(order)))
    return float(sum(len(b) * abs(confidence[b].mean() - correct[b].mean()) for b in bins) / len(order))


def brier(probs: Array, labels: Labels) -> float:
    """Mean squared distance to the one-hot label, summed over classes: 0 is best, 2 worst (Brier, 1950)."""
    probs, labels = np.asarray(probs), np.asarray(labels)
    onehot = np.eye(probs.shape[1])[labels]
    return float(((probs - onehot) ** 2).sum(1).mean())


def auroc(score: Array, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive row scores above a negative one; NaN when one kind is missing."""
    positive = np.asarray(positive, dtype=bool)
    if positive.all() or not positive.any():
        return float("nan")
    ranks = rankdata(score) / len(positive)  # torchmetrics reads scores outside of [0, 1] as logits
    return binary_auroc(torch.as_tensor(ranks), torch.as_tensor(positive).long()).item()


def error_auroc(probs: Array, labels: Labels) -> float:
    """How well the entropy of the prediction tells wrong rows from right ones."""
    _, correct = _confidence(probs, labels)
    return auroc(entropy(np.asarray(probs)), ~correct)


def ood_auroc(inside: Array, outside: Array) -> float:
    """AUROC of an uncertainty score (higher = less certain) for telling out-of-distribution rows."""
    return auroc(np.concatenate([inside, outside]), np.arange(len(inside) + len(outside)) >= len(inside))


def risk_coverage(probs: Array, labels: Labels, *, uncertainty: Array | None = None) -> tuple[Array, Array]:
    """Coverage (share answered) and risk (error among the answered), most certain rows first.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        uncertainty: (N,) score that orders the rows, higher = less certain; default: 1 - maximum probability.

    Raises:
        ValueError: an uncertainty of another shape, or one that is not finite.
    """
    confidence, correct = _confidence(probs, labels)
    score = -confidence if uncertainty is None else np.asarray(uncertainty)
    if score.shape != correct.shape or not np.isfinite(score).all():
        raise ValueError(f"uncertainty has shape {score.shape}: expected {correct.shape}, a finite number a row.")
    order = np.argsort(score, kind="stable")
    _, tie = np.unique(score[order], return_inverse=True)
    wrong = ~correct[order]
    share = (np.bincount(tie, wrong) / np.bincount(tie))[tie]  # rows that tie are answered in random order
    answered = np.arange(1, len(wrong) + 1)
    return answered / len(wrong), np.minimum(np.cumsum(share) / answered, 1.0)


def aurc(probs: Array, labels: Labels, *, uncertainty: Array | None = None) -> float:
    """Area under the risk-coverage curve; lower is better (Geifman and El-Yaniv, 2017); see :func:`risk_coverage`."""
    return float(risk_coverage(probs, labels, uncertainty=uncertainty)[1].mean())


def entropy(probs: Array) -> Array:
    """Entropy of each row, nats, (N,)."""
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


def classification_report(
    probs: Array, labels: Labels, *, bootstrap: int = 0, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """All metrics as one row ``value``; with ``bootstrap`` resamples of the rows also ``low`` and ``high``.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        bootstrap: number of resamples for percentile intervals (Efron, 1979); 0 for none.
        level: coverage of the intervals.
        seed: of the resampling.
    """
    probs, labels = np.asarray(probs), np.asarray(labels)
    _check(probs, labels)
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1.")
    table: dict[str, Any] = {"value": {name: fn(probs, labels) for name, fn in CLASSIFICATION.items()}}
    if bootstrap:
        rng = np.random.default_rng(seed)
        picks = rng.integers(len(labels), size=(bootstrap, len(labels)))
        resampled = pd.DataFrame([{n: fn(probs[i], labels[i]) for n, fn in CLASSIFICATION.items()} for i in picks])
        tails = resampled.quantile([(1 - level) / 2, (1 + level) / 2])
        table["low"], table["high"] = tails.iloc[0].to_dict(), tails.iloc[1].to_dict()
    return pd.DataFrame.from_dict(table, orient="index")


def reliability(probs: Array, labels: Labels, *, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Rows ``confidence``, ``accuracy``, ``count`` of each non-empty equal-width bin of the top probability."""
    confidence, correct = _confidence(probs, labels)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    frame = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": correct.astype(float)})
    grouped = frame.groupby("bin")
    return grouped.mean().assign(count=grouped.size())


def _confidence(probs: Array, labels: Labels) -> tuple[Array, NDArray[np.bool_]]:
    probs, labels = np.asarray(probs), np.asarray(labels)
    return probs.max(1), probs.argmax(1) == labels


def _check(probs: Array, labels: Labels) -> None:
    if probs.ndim != 2 or labels.ndim != 1 or len(probs) != len(labels) or len(labels) == 0:
        raise ValueError(f"probs has shape {probs.shape}, labels {labels.shape}: expected (N, C) and (N,) with N >= 1.")
    if not (probs >= -1e-6).all() or not np.allclose(probs.sum(1), 1, atol=1e-3):
        raise ValueError("Each row of probs must be finite, not negative, and sum to 1.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Labels must be integers (class indices), got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"Labels must lie in 0 to {probs.shape[1] - 1}, got {labels.min()} to {labels.max()}.")
