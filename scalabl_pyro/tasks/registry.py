"""Tasks that a saved posterior can name: their configuration, and how they are built from it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .._errors import nearest
from ..storage.budget import Budget
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

#: Classes of this library, by name.
TASKS: dict[str, type[Task]] = {
    task.__name__: task
    for task in (
        *(MultipleChoice, SequenceClassification, Regression, Completion),
        *(LabelCompletion, MultiLabelClassification, OrderedClassification, CountRegression, RobustRegression),
    )
}


def to_config(task: Task) -> dict[str, Any]:
    """Return what is saved of a task besides its tensors and its tokenizer: ``class`` and ``options``."""
    name = type(task).__name__
    if name in TASKS and type(task) is not TASKS[name]:
        name = f"{type(task).__module__}.{name}"  # a user's class with the name of one of this library
    return {"class": name, "options": {option: _jsonable(getattr(task, option)) for option in task.options}}


def from_options(
    name: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], *, budget: Budget | None = None
) -> Task:
    """Build a saved task again. Neither its tokenizer nor a chat template runs before the first use of the task.

    Args:
        name: Name of a class in :data:`TASKS`.
        tokenizer: Its tokenizer.
        options: Its options, as :func:`to_config` gave them.
        budget: Budget that the characters to tokenize are drawn from.

    Raises:
        ValueError: The task does not have an option of this name, or refuses the value.
    """
    task = TASKS[name]
    if unknown := sorted(set(options) - set(task.options)):
        raise ValueError(f"unknown options of {name}: {unknown}. {nearest(unknown[0], task.options)}")
    return task.from_saved(tokenizer, {**task.added_options, **options}, budget=budget or Budget())


def _jsonable(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else list(value) if isinstance(value, tuple) else value
