"""Data: rows, which become tokenized examples, which become right-padded batches."""

from .batch import Batch, Example, collate, evaluation_batches
from .encoding import check_tokens, encode
from .rows import Row, as_question, read_rows
from .split import stratified_split
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
    "stratified_split",
    "training_source",
]
