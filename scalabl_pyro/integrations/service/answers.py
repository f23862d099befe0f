"""Answers of the service: the rows of a joint batch given back to their requests, as values that JSON can hold."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...prediction.collect import used_classes
from ...prediction.label_sets import LabelSetPrediction
from ...prediction.result import NumericPrediction, Prediction
from ...prediction.scored_texts import ScoredTexts
from ...storage.json_values import json_value, records
from ...tasks import Task


def spans(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield the places of each part in a whole.

    Example:
        >>> list(spans([2, 1]))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def rows_of(prediction: Prediction | NumericPrediction, rows: slice) -> Prediction | NumericPrediction:
    """Return the prediction of some of its rows.

    Args:
        prediction: Prediction of N rows.
        rows: Places of the rows.
    """
    whole: Any = prediction
    kept = {name: value[:, rows] for name in whole.PER_DRAW if (value := getattr(whole, name)) is not None}
    target = None if whole.target is None or not whole.is_answered[rows].any() else whole.target[rows]
    return replace(whole, target=target, **kept)


def predicted(
    prediction: Prediction | NumericPrediction | LabelSetPrediction, task: Task, examples: Sequence[Any], level: float
) -> list[dict[str, Any]]:
    """Return what ``to_frame`` says of each row; for classes with ``probs``, the probability of each by its name.

    Args:
        prediction: Prediction of N rows.
        task: Task that defines the likelihood.
        examples: The N tokenized rows. They say which classes the rows have, where others shared their batch.
        level: Probability inside the interval of a number.
    """
    if isinstance(prediction, NumericPrediction):
        return records(prediction.to_frame(level=level))
    if isinstance(prediction, LabelSetPrediction):
        return records(prediction.to_frame())
    classes = used_classes(task, examples, len(prediction.classes))[: len(prediction.classes)]
    own = replace(prediction, log_probs=prediction.log_probs[..., : len(classes)], classes=classes)
    names, probs = [str(name) for name in classes], own.probs
    lines = records(own.to_frame())
    return [
        line | {"probs": dict(zip(names, map(json_value, row), strict=True))}
        for line, row in zip(lines, probs, strict=True)
    ]


def scored(texts: ScoredTexts, rows: slice, *, tokens: bool) -> list[dict[str, Any]]:
    """Return what ``to_frame`` says of each text, and what ``tokens`` says of each of its tokens.

    Args:
        texts: Scored texts.
        rows: Places of the texts.
        tokens: Whether to add a list ``tokens``.
    """
    lines = records(texts.to_frame()[rows])
    if tokens:
        lines = [line | {"tokens": records(texts.tokens(i))} for i, line in zip(_places(rows), lines, strict=True)]
    return lines


def _places(rows: slice) -> range:
    return range(rows.start, rows.stop)
