"""Intervals that hold the right number with a given probability, from standard deviations or quantiles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from .._arguments import check_role, known_arguments, known_arguments_of_methods
from .._display import Summarized
from .._errors import check_choice
from ..metrics import Array, check_level
from ..prediction.result import NumericPrediction
from .inputs import check_numbers, check_scores
from .ranks import coverage_in_words, threshold

Score = Literal["sd", "quantile"]


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class Intervals(Summarized):
    """An interval for each of N rows.

    Attributes:
        low: (N,) lower bounds, in the units of the answers.
        high: (N,) upper bounds.
        target: (N,) numbers, NaN where a row has no answer; None if no row has one.

    Example:
        >>> Intervals(np.zeros(2), np.ones(2), np.array([0.5, 3.0])).metrics()["coverage"].item()
        0.5
    """

    low: Array
    high: Array
    target: Array | None

    def to_frame(self) -> pd.DataFrame:
        """Make a table with the columns ``low`` and ``high``, and ``target`` where answers are known."""
        frame = pd.DataFrame({"low": self.low, "high": self.high})
        return frame if self.target is None else frame.assign(target=self.target)

    def metrics(self) -> pd.DataFrame:
        """Compute the share of intervals that hold the right number, and their mean width.

        Rows without an answer do not count for ``coverage``, which is NaN if no row has one.
        """
        target = np.full(len(self.low), np.nan) if self.target is None else np.asarray(self.target)
        known = ~np.isnan(target)
        held = (self.low <= target) & (target <= self.high)
        coverage = float(held[known].mean()) if known.any() else float("nan")
        return pd.DataFrame({"coverage": coverage, "mean_width": float((self.high - self.low).mean())}, index=["value"])

    def _summary(self) -> Mapping[str, object]:
        return {"rows": len(self.low), "mean_width": float((self.high - self.low).mean())}


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class IntervalRule(Summarized):
    """Turns a predictive distribution into intervals; see :func:`prediction_intervals`.

    Attributes:
        level: Least probability that an interval holds the right number.
        score: ``"sd"`` or ``"quantile"``.
        threshold: Half width in predictive standard deviations (``"sd"``), or what is added at both ends of the
            predictive interval, in the units of the answers (``"quantile"``).
        num_rows: Number of calibration rows.
    """

    level: float
    score: Score
    threshold: float
    num_rows: int

    @property
    def guarantee(self) -> str:
        """What holds, in words."""
        return (
            f"If a new row and the {self.num_rows} calibration rows are exchangeable, its interval holds the right "
            f"number with a probability of at least {self.level}. {coverage_in_words(self.num_rows, self.level)} It "
            "holds on average over rows, not for each kind of row."
        )

    def apply(self, prediction: Any) -> Intervals:
        """Make the intervals of new rows.

        With ``"quantile"``, an interval whose ends would cross is the point in the middle.

        Args:
            prediction: Prediction of new rows.

        Raises:
            TypeError: ``prediction`` is not a prediction of numbers, or it lacks the draws that quantiles need.

        Example:
            >>> one = np.ones((1, 1))
            >>> new = NumericPrediction(one, one, one, None, None, is_normal=True)
            >>> IntervalRule(0.9, "sd", 2.0, 50).apply(new).high
            array([3.])
        """
        center, half = _center_and_half_width("prediction", prediction, self.score, self.level)
        half = half * self.threshold if self.score == "sd" else np.maximum(half + self.threshold, 0.0)
        return Intervals(center - half, center + half, prediction.target)

    def _summary(self) -> Mapping[str, object]:
        return {"level": self.level, "score": self.score, "threshold": self.threshold, "rows": self.num_rows}


@known_arguments
def prediction_intervals(calibration: Any, *, level: float = 0.9, score: Score = "sd") -> IntervalRule:
    """Calibrate intervals that hold the right number with a probability of at least ``level``.

    Split conformal prediction: the threshold is the k-th smallest score of the n calibration rows, with
    k = ceil((n + 1) level).

    Args:
        calibration: Prediction of rows with answers that were not trained on. Rows without an answer are left out.
        level: Least probability that an interval holds the right number, between 0 and 1.
        score: ``"sd"`` is abs(y - mean) / sd with the predictive standard deviation sd, so that an interval is
            mean - q sd to mean + q sd. ``"quantile"`` is max(low - y, y - high), where low and high are the ends of
            ``prediction.interval(level)``, so that an interval is low - q to high + q.

    Returns:
        A rule. ``rule.apply(prediction)`` makes the intervals of new rows, and ``rule.guarantee`` says what holds.

    Raises:
        TypeError: ``calibration`` is not a prediction of numbers, or it lacks the draws that quantiles need.
        ValueError: There are too few rows, a standard deviation is 0, or an option is out of range.

    Example:
        >>> y = np.linspace(-1, 1, 39)
        >>> zero = np.zeros((1, 39))
        >>> calibration = NumericPrediction(zero, zero + 1, zero, None, y, is_normal=True)
        >>> round(prediction_intervals(calibration, level=0.9).threshold, 3)
        0.947

    References:
        Normalized scores: Lei et al., Distribution-Free Predictive Inference for Regression, 2018, section 5.2.
        Quantiles: Romano, Patterson and Candès, Conformalized Quantile Regression, 2019.
    """
    check_level(level)
    check_choice("score", score, ("sd", "quantile"))
    check_numbers("calibration", calibration)
    known = calibration.with_answers()
    center, half = _center_and_half_width("calibration", known, score, level)
    error = np.abs(np.asarray(known.target) - center)
    if score == "sd" and (half <= 0).any():
        raise ValueError(
            f"The predictive standard deviation of calibration row {int(np.flatnonzero(half <= 0)[0])} is 0, so its "
            "error cannot be divided by it. Use score='quantile'."
        )
    scores = error / half if score == "sd" else error - half
    check_scores(scores, len(error), what="The score of the calibration rows")
    return IntervalRule(level, score, threshold(scores, level), len(scores))


def _center_and_half_width(name: str, prediction: Any, score: Score, level: float) -> tuple[Array, Array]:
    """Middle of each interval and its half width: mean and standard deviation, or those of the predictive interval.

    max(low - y, y - high) = abs(y - center) - half, so one form serves both scores.
    """
    check_numbers(name, prediction)
    if score == "sd":
        return prediction.mean, np.sqrt(prediction.total)
    check_role(name, prediction, "prediction", kind=NumericPrediction)
    low, high = prediction.interval(level).T
    return (low + high) / 2, (high - low) / 2
