"""Tasks: how a row becomes tokens, and how the LLM's output becomes a distribution over the answer.

A task is the likelihood half of the Pyro program. To write one, subclass :class:`Task` and define ``encode``
(row -> :class:`~scalabl_pyro.data.Example`) and ``likelihood`` (outputs -> distribution); see the how-to page
*Own task*.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .._errors import nearest
from .base import Task, at_least_float32, copy_task
from .multiple_choice import MultipleChoice
from .text import Regression, SequenceClassification

__all__ = ["MultipleChoice", "Regression", "SequenceClassification", "Task", "at_least_float32", "copy_task"]

#: Tasks that a saved posterior can name.
TASKS: dict[str, type[Task]] = {task.__name__: task for task in (MultipleChoice, SequenceClassification, Regression)}


def to_config(task: Task) -> dict[str, Any]:
    """What is saved of a task besides its tensors and its tokenizer."""
    name = type(task).__name__
    if name in TASKS and type(task) is not TASKS[name]:
        name = f"{type(task).__module__}.{name}"  # a namesake of the user's own
    return {"class": name, "options": {option: _jsonable(getattr(task, option)) for option in task.options}}


def from_options(name: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Task:
    """A saved task back.

    Raises:
        ValueError: an option that the task lacks, or a value that it refuses.
    """
    task = TASKS[name]
    if unknown := sorted(set(options) - set(task.options)):
        raise ValueError(f"unknown options of {name}: {unknown}. {nearest(unknown[0], task.options)}")
    return task(tokenizer, **options)


def _jsonable(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else list(value) if isinstance(value, tuple) else value
