"""Tasks: how a row becomes tokens, and how the LLM's output becomes a distribution over the answer.

A task is the likelihood half of the Pyro program. To write one, subclass :class:`Task` and define ``encode``
(row -> :class:`~scalabl_pyro.data.Example`) and ``likelihood`` (outputs -> distribution); see the page
*Own task*.
"""

from .base import Task, at_least_float32, copy_task
from .completion import Completion
from .counts import CountRegression
from .from_data import from_data
from .label_completion import LabelCompletion
from .multi_label import MultiLabelClassification
from .multiple_choice import MultipleChoice
from .ordered import OrderedClassification
from .registry import TASKS, from_options, to_config
from .regression import Regression
from .robust import RobustRegression
from .text import SequenceClassification

__all__ = [
    "TASKS",
    "Completion",
    "CountRegression",
    "LabelCompletion",
    "MultiLabelClassification",
    "MultipleChoice",
    "OrderedClassification",
    "Regression",
    "RobustRegression",
    "SequenceClassification",
    "Task",
    "at_least_float32",
    "copy_task",
    "from_data",
    "from_options",
    "to_config",
]
