"""What a table should be asked before it is used: gaps, empty texts, and columns of the wrong type."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .._values import is_missing, number, plain
from .batch import Example
from .row_form import RowForm

logger = logging.getLogger(__name__)

#: Largest number of rows that a message names.
MAX_NAMED = 5


def rows_in_words(indices: Sequence[int], total: int) -> str:
    """Say how many rows there are, and which.

    Example:
        >>> rows_in_words([1, 4, 7], 400), rows_in_words(range(9), 9)
        ('3 of 400 rows (1, 4, 7)', '9 of 9 rows (0, 1, 2, 3, 4, ...)')
    """
    named = ", ".join(map(str, indices[:MAX_NAMED])) + (", ..." if len(indices) > MAX_NAMED else "")
    return f"{len(indices)} of {total} rows ({named})"


def count_of_gaps(rows: Sequence[Any], name: str) -> str:
    """Return a sentence that counts the rows without a value in a field; empty if only one row lacks it.

    Args:
        rows: All rows.
        name: Name of the field.
    """
    gaps = [i for i, row in enumerate(rows) if isinstance(row, Mapping) and is_missing(row.get(name))]
    return f" {rows_in_words(gaps, len(rows))} have no value in {name!r}." if len(gaps) > 1 else ""


def note_columns(rows: Sequence[Mapping[str, Any]], form: RowForm, examples: Sequence[Example]) -> None:
    """Log what is odd about the columns that a task reads, once per column.

    Args:
        rows: All rows, which the task could encode.
        form: Fields that the task reads.
        examples: The rows, tokenized.
    """
    for name in form.texts:
        values = [plain(row.get(name)) for row in rows]
        if empty := [i for i, value in enumerate(values) if isinstance(value, str) and not value.strip()]:
            logger.warning(
                "%s have an empty text in %r. Fill them, or leave these rows out.",
                rows_in_words(empty, len(rows)),
                name,
            )
        numbers = [value for value in values if number(value) is not None]
        if len(numbers) == len(values):
            logger.warning("The field %r holds numbers, such as %r, and is read as a text.", name, numbers[0])
    if form.names and any(isinstance(example.target, float) for example in examples):
        _note_texts(rows, form.names[-1])


def _note_texts(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Say that answers that must be numbers are texts."""
    texts = [value for row in rows if isinstance(value := plain(row.get(name)), str)]
    if texts:
        logger.warning(
            "The field %r holds numbers as texts in %d of %d rows, such as %r. They are read as numbers.",
            name,
            len(texts),
            len(rows),
            texts[0],
        )
