"""Reads what a plot is given: one prediction, or predictions of several methods by name."""

from collections.abc import Mapping
from typing import Any, cast

from .._arguments import check_role
from .._errors import describe
from ..metrics import Array, Labels
from ..prediction.averaged import AveragedPrediction
from ..prediction.result import Prediction

Scored = Prediction | AveragedPrediction
"""A prediction of classes, with or without its draws."""
Predictions = Scored | Mapping[str, Scored]
"""One prediction, or predictions of several methods by name."""


def answered(prediction: Any, *, name: str = "prediction") -> Scored:
    """Return the rows of a prediction whose answer is known.

    Args:
        prediction: What the caller gave.
        name: Its name in messages.

    Raises:
        TypeError: If it is not a prediction of classes.
        ValueError: If no row has an answer.
    """
    if not isinstance(prediction, AveragedPrediction):  # its averages are all that plots of this kind read
        check_role(name, prediction, "prediction")
    if not isinstance(prediction, Prediction | AveragedPrediction):
        raise TypeError(
            f"{name} is a {type(prediction).__name__}, but this plot needs class probabilities. Pass a Prediction "
            "of a classification task."
        )
    return prediction.with_answers()


def scored(prediction: Scored) -> tuple[Array, Labels]:
    """Return the probabilities and the labels of a prediction whose rows all have answers."""
    return prediction.probs, cast(Labels, prediction.target)


def by_name(predictions: Any, *, label: str | None, color: str | None) -> dict[str | None, Any]:
    """Return predictions by their label, which is None for a single one without a label.

    Args:
        predictions: What the caller gave: one prediction, or a mapping from names to predictions.
        label: Label of a single prediction.
        color: Color of a single prediction.

    Raises:
        TypeError: If a name is not a text.
        ValueError: If the mapping is empty, or if a label or a color comes with a mapping.
    """
    if not isinstance(predictions, Mapping):
        return {label: predictions}
    if not predictions:
        raise ValueError("No prediction is given. Pass predictions by name, such as {'ScalaBL': prediction}.")
    for option, value in {"label": label, "color": color}.items():
        if value is not None:
            raise ValueError(
                f"{option}={value!r} is for one prediction, but {len(predictions)} are given by name. Leave {option} "
                f"out, or call the plot once per method with ax= and {option}=."
            )
    for name in predictions:
        if not isinstance(name, str):
            raise TypeError(f"A name of the predictions is {describe(name)}, expected a text such as 'ScalaBL'.")
    return dict(predictions)


def name_of(label: str | None) -> str:
    """Return the name of a prediction in messages."""
    return "prediction" if label is None else f"prediction {label!r}"
