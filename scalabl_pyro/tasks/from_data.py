"""Guesses the task that fits a table: which column is the text, which the answer, and what kind of answer it is."""

import logging
from collections.abc import Mapping
from typing import Any

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._arguments import known_arguments
from .._errors import nearest
from .._values import integer, plain, shown
from ..data.columns import FEW_NUMBERS, Column, columns_of
from ..data.labels import UNLABELED, ClassIndex, ClassName
from ..data.model_names import model_order
from ..data.rows import read_rows
from ..data.twins import twins
from ..lora.targets import output_head
from .base import Task
from .completion import Completion
from .counts import CountRegression
from .label_completion import LabelCompletion
from .multi_label import MultiLabelClassification
from .multiple_choice import MultipleChoice
from .ordered import OrderedClassification
from .regression import Regression
from .robust import RobustRegression
from .text import SequenceClassification

logger = logging.getLogger(__name__)

#: Usual names of the column of the answer, and of the text. Earlier names win.
ANSWERS = (
    *("label", "labels", "target", "class", "classes", "category", "topic", "intent", "sentiment"),
    *("answer", "stars", "rating", "score", "count", "price", "value", "y"),
)
TEXTS = (
    "text",
    "note",
    "sentence",
    "review",
    "document",
    "content",
    "body",
    "message",
    "comment",
    "question",
    "prompt",
)
#: Tasks whose answers are classes.
WITH_CLASSES = (SequenceClassification, OrderedClassification, LabelCompletion, MultiLabelClassification)
#: Tasks for a table with one column of texts and one of answers.
TABLE_TASKS = (*WITH_CLASSES, Regression, RobustRegression, CountRegression)


@known_arguments
def from_data(
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    llm: nn.Module | None = None,
    task: type[Task] | None = None,
    split: str = "train",
    **options: Any,
) -> Task:
    """Guess the task that fits a table, and build it.

    The guess stands in one line of the log (a warning, so that it is seen) and in the ``repr`` of the task.
    Everything that you pass is taken as it is: only the rest is guessed.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        data: Rows in any form that :func:`scalabl_pyro.data.read_rows` takes, such as a DataFrame or a CSV file.
        llm: The model, whose head decides between the tasks for a causal LM and those for a classification model. Its
            ``config.id2label`` gives the order of the classes if it has the same names. Default: a classification
            model.
        task: The class of the task, such as :class:`OrderedClassification`. Default: it is guessed.
        split: Split of a hub data set.
        options: Options of the task, such as ``text="note"``, ``target="class"`` or ``max_length=256``.

    Returns:
        The task. Its classes are all values of the column, or those of a ``datasets.ClassLabel`` in its order.

    Raises:
        TypeError: ``task`` is not a class of a task for tables.
        ValueError: The text, the answer, or the order of ordered classes cannot be told, or the model has other
            classes than the data.

    Example:
        >>> from scalabl_pyro import tasks
        >>> rows = [{"note": "the sky", "class": "blue"}, {"note": "grass", "class": "green"}] * 20
        >>> task = tasks.from_data(tokenizer, rows)  # any Hugging Face tokenizer
        >>> task.classes, task.text, task.target
        (('blue', 'green'), 'note', 'class')
    """
    if task is not None and task not in TABLE_TASKS:
        allowed = ", ".join(kind.__name__ for kind in TABLE_TASKS)
        raise TypeError(f"task={shown(task)}: expected one of the classes {allowed}. Others read rows of a fixed form.")
    columns = columns_of(read_rows(data, split=split))
    module = getattr(getattr(llm, "adapter", None), "module", llm)
    is_causal = module is not None and output_head(module) is not None
    known = _known_form(columns) if task is None and not {"text", "target"} & set(options) else None
    if known is not None:
        _check_windows(known, options)
        return _say(known(tokenizer, **options), "its rows have the fields of this task")
    target = _target(columns, options)
    kind, why = (task, "as you say") if task is not None else _kind(target, is_causal=is_causal)
    _check_windows(kind, options)
    given: dict[str, Any] = {"text": _text(columns, target, options), "target": target.name, **options}
    if kind in WITH_CLASSES and "classes" not in given:
        names = _levels(target, data) if kind is OrderedClassification else _order(target.classes, module)
        if same := twins(names):
            logger.warning(
                "The column %r has the classes %s, which differ only in capital letters, spaces or the Unicode form of "
                "a letter. Make them one class, if they are one.",
                target.name,
                _listed(same),
            )
        given["classes"] = names
    return _say(kind(tokenizer, **given), _reason(given, target, why))


def _check_windows(kind: type[Task], options: Mapping[str, Any]) -> None:
    """Refuse windows where the task reads none."""
    given = [f"{name}={options[name]!r}" for name in ("windows", "overlap") if name in options]
    if given and "windows" not in kind.options:
        raise ValueError(
            f"{given[0]}: {kind.__name__} reads whole texts. Load a model with a classification head for windows, or "
            "leave them out; max_length= then cuts longer texts."
        )


def _known_form(columns: Mapping[str, Column]) -> type[Task] | None:
    """Return the task whose rows have exactly these names."""
    if {"question", "choices"} <= set(columns):
        return MultipleChoice
    return Completion if "messages" in columns or {"prompt", "completion"} <= set(columns) else None


def _target(columns: Mapping[str, Column], options: Mapping[str, Any]) -> Column:
    """Return the column of the answer."""
    if "target" in options:
        return _given(columns, "target", options["target"])
    usual = _usual(columns, ANSWERS)
    others = [
        c for c in columns.values() if c.kind not in ("texts", "nothing", "other") and c.name != options.get("text")
    ]
    if usual is None and len(others) != 1:
        raise ValueError(
            f"The table has the columns {list(columns)}, and nothing says which one holds the answer: pass target=, "
            "the name of its column."
        )
    return others[0] if usual is None else usual


def _text(columns: Mapping[str, Column], target: Column, options: Mapping[str, Any]) -> str:
    """Return the name of the column of the text: one with a usual name, or that of the longest texts."""
    if "text" in options:
        return _given(columns, "text", options["text"]).name
    texts = {name: c for name, c in columns.items() if c.is_text and name != target.name}
    if not texts:
        raise ValueError(f"The table has the columns {list(columns)}, and none but the answer holds texts: pass text=.")
    usual = _usual(texts, TEXTS)
    return (usual or max(texts.values(), key=lambda c: c.length)).name


def _given(columns: Mapping[str, Column], option: str, name: Any) -> Column:
    if name not in columns:
        raise ValueError(f"{option}={name!r}: the table has no such column. {nearest(str(name), map(str, columns))}")
    return columns[name]


def _usual(columns: Mapping[str, Column], names: tuple[str, ...]) -> Column | None:
    by_name = {str(name).casefold(): column for name, column in columns.items()}
    return next((by_name[name] for name in names if name in by_name and by_name[name].values), None)


def _kind(target: Column, *, is_causal: bool) -> tuple[type[Task], str]:
    """Return the task for a column of answers, and what was seen."""
    kind = target.kind
    if target.is_numbers_as_text:
        return Regression, "numbers that are written as texts"
    if kind == "lists":
        return MultiLabelClassification, "lists of classes"
    classify = LabelCompletion if is_causal else SequenceClassification
    if kind in ("classes", "truth values"):
        return classify, kind
    if kind == "whole numbers" and 2 <= len(target.classes) <= FEW_NUMBERS:
        if len(target.classes) == 2:
            return classify, "two whole numbers"
        return classify, "whole numbers; if they are ordered, pass task=OrderedClassification, or CountRegression"
    if kind in ("whole numbers", "numbers"):
        return Regression, kind
    raise ValueError(
        f"The column {target.name!r} holds {kind}: {len(set(map(str, target.values)))} different values in "
        f"{len(target.values)} rows. They are neither classes nor numbers. Pass target= for another column, or task= "
        "to say what they are."
    )


def _order(classes: tuple[ClassName, ...], module: nn.Module | None) -> tuple[ClassName, ...]:
    """Return the classes in the order of the outputs of a model that has names for them."""
    id2label = getattr(getattr(module, "config", None), "id2label", None)
    if (
        module is None or not isinstance(id2label, Mapping) or output_head(module) is not None
    ):  # causal LMs have two unused names
        return classes
    if (order := model_order(classes, id2label)) is not None:
        return tuple(classes[i] for i in order)
    names = [str(id2label.get(i)) for i in range(len(id2label))]
    if len(names) != len(classes):
        raise ValueError(
            f"The data has {len(classes)} classes, {_listed(classes)}, but the model's config.id2label has "
            f"{len(names)}: {_listed(names)}. Load the model with num_labels={len(classes)}, or pass classes=."
        )
    return classes


def _levels(target: Column, data: Any) -> tuple[ClassName, ...]:
    """Return ordered classes from the lowest to the highest: numbers, or names whose order the data gives.

    Raises:
        ValueError: Names have no order.
    """
    types = {str(name): dtype for name, dtype in data.dtypes.items()} if isinstance(data, pd.DataFrame) else {}
    if getattr(types.get(target.name), "ordered", False):
        return tuple(map(plain, types[target.name].categories))
    if _are_texts(target.classes) and not any(isinstance(value, ClassIndex) for value in target.values):
        raise ValueError(
            f"The column {target.name!r} has the classes {_listed(target.classes)}, whose order cannot be told: pass "
            "classes=, from the lowest to the highest."
        )
    return target.classes


def _reason(given: Mapping[str, Any], target: Column, why: str) -> str:
    """Say what was guessed, and from what."""
    classes = f" {len(given['classes'])} classes, {_listed(given['classes'])};" if "classes" in given else ""
    gaps = f"; {target.missing} row{'' if target.missing == 1 else 's'} without an answer" if target.missing else ""
    unlabeled = [v for v in target.values if not isinstance(v, list | str) and integer(v) == UNLABELED]
    if unlabeled and UNLABELED not in given.get("classes", unlabeled):
        rows = f"{len(unlabeled)} row{'' if len(unlabeled) == 1 else 's'}"
        gaps += f"; {rows} with {UNLABELED}, which stands for an unknown class; if it is one, pass classes="
    return f"text in {given['text']!r}, answer in {target.name!r}:{classes} {why}{gaps}"


def _listed(names: Any, limit: int = 4) -> str:
    return ", ".join(map(repr, list(names)[:limit])) + (", ..." if len(names) > limit else "")


def _are_texts(names: tuple[ClassName, ...]) -> bool:
    return all(isinstance(name, str) for name in names)


def _say(task: Task, guessed: str) -> Task:
    """Log what was guessed, and keep it for the repr of the task."""
    task.guessed = guessed
    logger.warning("Guessed the task %s: %s.", type(task).__name__, guessed)
    return task
