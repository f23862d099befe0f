"""Predictions with a guarantee, from calibration rows: sets, intervals, and answers with a bounded error rate.

Each function takes the prediction of calibration rows (rows with answers that were not trained on) and returns a rule.
The rule is applied to predictions of new rows, and its ``guarantee`` says in words what holds. No guarantee needs a
good model or a good posterior: a bad one gives large sets, wide intervals and few answers.

Example:
    >>> import numpy as np
    >>> from scalabl_pyro import Prediction, conformal
    >>> p = np.linspace(0.5, 0.98, 49)
    >>> calibration = Prediction(np.log([np.stack([p, 1 - p], axis=1)]), np.zeros(49, int), ("yes", "no"))
    >>> rule = conformal.prediction_sets(calibration, level=0.9)
    >>> new = Prediction(np.log([[[0.95, 0.05], [0.53, 0.47]]]), None, ("yes", "no"))
    >>> rule.apply(new).names
    [('yes',), ('yes',)]
"""

from .abstention import AnswerRule, selective_answers
from .intervals import IntervalRule, Intervals, prediction_intervals
from .ranks import coverage_law
from .sets import ClassSets, SetRule, prediction_sets

__all__ = [
    "AnswerRule",
    "ClassSets",
    "IntervalRule",
    "Intervals",
    "SetRule",
    "coverage_law",
    "prediction_intervals",
    "prediction_sets",
    "selective_answers",
]
