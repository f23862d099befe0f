"""Checks of the predictions that calibrate a rule, or that a rule is applied to."""

from typing import Any

import numpy as np

from .._arguments import check_role
from ..metrics import Array
from ..prediction.scores import ClassScores, NumberScores


def check_classes(name: str, prediction: Any) -> None:
    """Raise TypeError unless this is a prediction of classes."""
    if isinstance(prediction, NumberScores):
        raise TypeError(f"{name} is a prediction of numbers, expected one of classes. Use prediction_intervals().")
    check_role(name, prediction, "prediction", kind=ClassScores)


def check_numbers(name: str, prediction: Any) -> None:
    """Raise TypeError unless this is a prediction of numbers."""
    if isinstance(prediction, ClassScores):
        raise TypeError(f"{name} is a prediction of classes, expected one of numbers. Use prediction_sets().")
    check_role(name, prediction, "prediction", kind=NumberScores)


def check_same_classes(prediction: Any, classes: tuple[Any, ...]) -> None:
    """Raise ValueError unless the classes are those of the calibration rows."""
    if tuple(prediction.classes) != classes:
        raise ValueError(
            f"The prediction has the classes {tuple(prediction.classes)}, but the calibration rows had {classes}."
        )


def check_scores(scores: Array, rows: int, *, what: str) -> None:
    """Raise ValueError unless there is one score per row, without NaN."""
    if scores.shape != (rows,) or not np.issubdtype(scores.dtype, np.number) or np.isnan(scores).any():
        raise ValueError(f"{what} has shape {scores.shape}, or holds NaN: expected ({rows},), one number per row.")
