"""Selective prediction: scores of doubt, and a threshold on doubt that keeps the error of answered rows low."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from scalabl_pyro import Prediction

SCORES = ("max_prob", "entropy", "mutual_information")


def doubt(prediction: Prediction, score: str) -> NDArray[np.floating]:
    """Compute the uncertainty of each row.

    Args:
        prediction: Prediction of N rows.
        score: ``"max_prob"``, 1 - max_c p_c, the error rate that the model predicts; ``"entropy"``, H[p] in nats; or
            ``"mutual_information"`` of answer and draw in nats, the part of the entropy that draws disagree on.

    Returns:
        (N,) uncertainties. Higher means less certain.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown: use {', '.join(SCORES)}.")
    if score == "max_prob":
        return 1 - prediction.probs.max(1)
    return prediction.total if score == "entropy" else prediction.epistemic


def threshold(
    uncertainty: NDArray[np.floating], wrong: NDArray[np.bool_], risk: float, *, delta: float | None = None
) -> float:
    """Find the largest threshold t such that rows with uncertainty <= t have an error rate of at most ``risk``.

    Without ``delta``, the error rate is the one seen on the given validation rows. With ``delta``, the error rate of
    *new* rows is at most ``risk`` with probability 1 - delta. This uses the bounds of Clopper and Pearson (1934) at the
    thresholds that a binary search visits (Geifman and El-Yaniv, 2017, algorithm 1).

    Args:
        uncertainty: (N,) uncertainties of validation rows.
        wrong: (N,) whether the answer to each row is wrong.
        risk: Largest allowed error rate of answered rows, between 0 and 1.
        delta: Probability that the bound may fail, between 0 and 1.

    Returns:
        The threshold; -inf if no row may be answered.

    Raises:
        ValueError: No rows are given, the lengths differ, or risk or delta lies outside (0, 1).
    """
    uncertainty, wrong = np.asarray(uncertainty), np.asarray(wrong, dtype=bool)
    if uncertainty.ndim != 1 or uncertainty.shape != wrong.shape or len(wrong) == 0:
        raise ValueError(
            f"uncertainty has shape {uncertainty.shape} and wrong has shape {wrong.shape}: expected (N,) twice, N >= 1."
        )
    for name, value in {"risk": risk, "delta": 0.5 if delta is None else delta}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1.")
    values, ends = np.unique(np.sort(uncertainty), return_index=True)  # Tied rows are answered together or not at all.
    answered = np.append(ends[1:], len(wrong))
    errors = np.cumsum(wrong[np.argsort(uncertainty, kind="stable")])[answered - 1]
    if delta is None:
        allowed = np.flatnonzero(errors <= risk * answered)
        return float(values[allowed[-1]]) if len(allowed) else -np.inf
    low, high, best = 0, len(values) - 1, -np.inf
    each = delta / max(int(np.ceil(np.log2(len(values) + 1))), 1)
    while low <= high:
        middle = (low + high) // 2
        if upper_bound(int(errors[middle]), int(answered[middle]), each) <= risk:
            best, low = float(values[middle]), middle + 1
        else:
            high = middle - 1
    return best


def upper_bound(errors: int, rows: int, delta: float) -> float:
    """Compute the exact upper bound of an error rate that holds with probability 1 - delta.

    Args:
        errors: Number of wrong answers seen.
        rows: Number of answers seen.
        delta: Probability that the true error rate is larger.
    """
    return 1.0 if errors == rows else float(beta.ppf(1 - delta, errors + 1, rows - errors))
