"""Tasks: how a row becomes tokens, and how the LLM's output becomes a distribution over the answer.

A task is the likelihood half of the Pyro program. To write one, subclass :class:`Task` and define ``encode``
(row -> :class:`~scalabl_pyro.data.Example`) and ``likelihood`` (outputs -> distribution); see the page
*Own task*.
"""

from .base import Task, at_least_float32, copy_task
from .completion import Completion
from .multiple_choice import MultipleChoice
from .registry import TASKS, from_options, to_config
from .regression import Regression
from .text import SequenceClassification

__all__ = [
    "TASKS",
    "Completion",
    "MultipleChoice",
    "Regression",
    "SequenceClassification",
    "Task",
    "at_least_float32",
    "copy_task",
    "from_options",
    "to_config",
]
