"""What a report says first: a few sentences on how good the predictions are, for readers who know no metric."""

from typing import Any

import numpy as np
import pandas as pd

from ..prediction.label_sets import LabelSetPrediction
from ..prediction.result import NumericPrediction

#: A gap between confidence and accuracy below this number of standard errors may be chance.
STANDARD_ERRORS = 2.0


def verdict(found: Any, table: pd.DataFrame, metrics: pd.DataFrame, *, review_above: float | None) -> list[str]:
    """Say in a few sentences how good predictions are.

    Args:
        found: Prediction of N rows with answers.
        table: Its review table, N lines, with ``needs_review`` if there is a limit.
        metrics: Its metrics, with the rows ``value``, ``low`` and ``high``.
        review_above: Limit of the doubt above which a person reads a row; None for no such rule.

    Returns:
        Sentences.
    """
    if isinstance(found, NumericPrediction):
        return _of_numbers(table, review_above)
    right = are_right(table)
    if isinstance(found, LabelSetPrediction):
        sentences = [_share_right(metrics["subset_accuracy"], "sets of labels", len(table))]
    else:
        sentences = [_share_right(metrics["accuracy"], "answers", len(table)), _how_sure(table["probability"], right)]
    if review_above is None:
        return sentences
    alone = ~table["needs_review"].to_numpy()
    wrong = f"{_percent((~right[alone]).mean(), 1)} of these answers are wrong. " if alone.any() else ""
    said = f"At the limit {review_above:g}, the model answers {_count(alone)} alone. "
    return [*sentences, said + wrong + _left(alone)]


def are_right(table: pd.DataFrame) -> np.ndarray:
    """Tell which predictions of classes, or of sets of labels, are the answer, (N,)."""
    return np.array([a == b for a, b in zip(table["prediction"], table["target"], strict=True)], dtype=bool)


def _of_numbers(table: pd.DataFrame, review_above: float | None) -> list[str]:
    off = (table["target"] - table["prediction"]).abs()
    inside = float((off <= 2 * table["sd"]).mean())
    sentences = [
        f"On average, a prediction is {off.mean():.3g} away from the answer, in the units of the answer.",
        f"{_percent(inside)} of the answers lie within two standard deviations of their prediction. "
        "If the standard deviations are right, about 95 % do.",
    ]
    if review_above is None:
        return sentences
    alone = ~table["needs_review"].to_numpy()
    far = f"They are {off[alone].mean():.3g} away on average. " if alone.any() else ""
    return [*sentences, f"At the limit {review_above:g}, {_count(alone)} are answered. {far}{_left(alone)}"]


def _share_right(metric: pd.Series, what: str, count: int) -> str:
    low, high = metric.get("low", np.nan), metric.get("high", np.nan)
    interval = "" if np.isnan(low) else f" (95 % interval: {_percent(low)} to {_percent(high)})"
    return f"{_percent(metric['value'])} of the {what} for {count} rows are right{interval}."


def _how_sure(probability: pd.Series, right: np.ndarray) -> str:
    """Compare the mean confidence with the accuracy. If confidence is right, the variance of a row is p (1 - p)."""
    sure, accuracy = float(probability.mean()), float(right.mean())
    error = float(np.sqrt((probability * (1 - probability)).sum())) / len(right)
    facts = f"The model is right in {_percent(accuracy)} of the rows, and on average it says {_percent(sure)}."
    if abs(sure - accuracy) <= STANDARD_ERRORS * error:
        return f"{facts} So it is about as sure as it should be, as far as {len(right)} rows can tell."
    if sure > accuracy:
        return f"{facts} So it is too sure: a temperature from other rows can mend this."
    return f"{facts} So it is less sure than it could be."


def _count(alone: np.ndarray) -> str:
    return f"{alone.sum()} of {len(alone)} rows ({_percent(alone.mean())})"


def _left(alone: np.ndarray) -> str:
    rest = len(alone) - int(alone.sum())
    return f"A person reads the other {rest}." if rest else "No row is left for a person."


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"
