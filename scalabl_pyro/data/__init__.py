"""Data: rows, tokenized examples, and batches."""

from .batch import Batch, Example
from .encoding import check_tokens, collate, encode, evaluation_batches
from .rows import Row, as_question, read_rows
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
