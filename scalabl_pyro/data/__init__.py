"""Data: rows, tokenised examples, and batches."""

from .batch import Batch, Example, check_tokens, collate, encode, evaluation_batches
from .hub_rows import Row, as_question
from .rows import read_rows
from .training_batches import Cycle, TrainingBatches, training_source

__all__ = [
    "Batch",
    "Cycle",
    "Example",
    "Row",
    "TrainingBatches",
    "as_question",
    "check_tokens",
    "collate",
    "encode",
    "evaluation_batches",
    "read_rows",
    "training_source",
]
