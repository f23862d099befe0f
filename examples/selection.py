"""Answer only where it is safe: scores of doubt, and a threshold that keeps the error of what is answered low."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from scalabl_pyro import Prediction

SCORES = ("max_prob", "entropy", "mutual_information")


def doubt(prediction: Prediction, score: str) -> NDArray[np.floating]:
    """(N,) uncertainty of each row, higher = less certain.

    ``max_prob`` is 1 - max_c p_c, the risk of the answer as the model predicts it; ``entropy`` is H[p];
    ``mutual_information`` of answer and draw is the part of the entropy in which the draws disagree (nats).
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown: use {', '.join(SCORES)}.")
    if score == "max_prob":
        return 1 - prediction.probs.max(1)
    return prediction.total if score == "entropy" else prediction.epistemic


def threshold(
    uncertainty: NDArray[np.floating], wrong: NDArray[np.bool_], risk: float, *, delta: float | None = None
) -> float:
    """Largest threshold t on validation such that the rows with uncertainty <= t have an error of ``risk`` at most.

    Without ``delta`` this is the error seen on validation. With it, the error of *new* rows is at most ``risk`` with
    probability 1 - delta: bounds of Clopper and Pearson (1934) at the thresholds that a binary search visits (Geifman
    and El-Yaniv, 2017, algorithm 1).

    Args:
        uncertainty: (N,) of validation rows.
        wrong: (N,) whether their answers are wrong.
        risk: error among answered rows that is allowed, between 0 and 1.
        delta: probability that the bound may fail.

    Returns:
        The threshold; -inf where no row may be answered.

    Raises:
        ValueError: no rows, other lengths, or a risk or delta outside of (0, 1).
    """
    uncertainty, wrong = np.asarray(uncertainty), np.asarray(wrong, dtype=bool)
    if uncertainty.ndim != 1 or uncertainty.shape != wrong.shape or len(wrong) == 0:
        raise ValueError(
            f"uncertainty has shape {uncertainty.shape}, wrong {wrong.shape}: expected (N,) twice, N >= 1."
        )
    for name, value in {"risk": risk, "delta": 0.5 if delta is None else delta}.items():
        if not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1.")
    values, ends = np.unique(np.sort(uncertainty), return_index=True)  # rows that tie are answered together
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
    """Exact upper bound of an error rate of which ``errors`` of ``rows`` were seen, with probability 1 - delta."""
    return 1.0 if errors == rows else float(beta.ppf(1 - delta, errors + 1, rows - errors))
