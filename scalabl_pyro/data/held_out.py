"""Held-out rows: rows with answers that a training is scored on, and checks of them against the training rows."""

import functools
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .._arguments import known_arguments
from .._errors import ScalaBLWarning, describe, stacklevel_outside
from .._process.random_state import scoped_seed
from .batch import Batch, Example, digest_of
from .encoding import encode_data
from .labels import ClassName
from .rows import Row

#: Largest number of rows or classes that a message names.
MAX_NAMED = 5


@dataclass(frozen=True)
class HeldOutRows:
    """Tokenized rows with answers that no step trains on.

    Attributes:
        examples: One example per row.

    Example:
        >>> from scalabl_pyro.data import Example
        >>> from scalabl_pyro.data.held_out import HeldOutRows
        >>> len(HeldOutRows([Example({"input_ids": [5]}, target=0)]).digest)
        64
    """

    examples: Sequence[Example]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of tokens, answers and other numbers of all rows, in their order."""
        return digest_of(self.examples)


@known_arguments
def read_held_out(
    source: Any,
    encode_row: Callable[[Row], Example],
    *,
    train: Sequence[Example] = (),
    classes: Sequence[ClassName] | None = None,
) -> HeldOutRows:
    """Read and tokenize held-out rows, and warn if they overlap the training rows or have other classes.

    Args:
        source: Rows in any form that :func:`~scalabl_pyro.data.read_rows` takes. Of a hub data set, it is the split
            "validation".
        encode_row: The task's method ``encode``.
        train: Training rows, if they are known.
        classes: Names of the classes; None if the answers are not classes.

    Returns:
        The rows, all with an answer.

    Raises:
        TypeError: ``source`` yields batches, or holds no rows.
        ValueError: There are no rows, a row does not fit the task, or a row has no answer.

    Example:
        >>> from scalabl_pyro.data import Example
        >>> from scalabl_pyro.data.held_out import read_held_out
        >>> def encode_row(row):
        ...     return Example({"input_ids": list(row["text"].encode())}, target=row["label"])
        >>> len(read_held_out([{"text": "ab", "label": 1}], encode_row).examples)
        1
    """
    _refuse_batches(source)
    try:
        examples = encode_data(source, encode_row, need_target=True, split="validation")
    except (ValueError, TypeError) as error:
        raise type(error)(f"eval_data: {error}") from error
    if train:
        _warn_of_overlap(train, examples)
        if classes is not None:
            _warn_of_new_classes(train, examples, classes)
    return HeldOutRows(examples)


def _refuse_batches(source: Any) -> None:
    if isinstance(source, str | Iterator) or not isinstance(source, Iterable):
        return
    with scoped_seed(0):  # a DataLoader draws from the global generator when it starts
        first = next(iter(source), None)
    if isinstance(first, Batch):
        raise TypeError(
            f"eval_data is {describe(source)} that yields batches, expected rows: a list of dicts, a datasets.Dataset, "
            "or the path of a JSONL file. evaluation=EvaluationOptions(batch_size=...) sets the rows per pass."
        )


def _warn_of_overlap(train: Sequence[Example], examples: Sequence[Example]) -> None:
    """Warn of rows whose tokens are those of a training row: the answer may differ."""
    first: dict[str, int] = {}
    for i, example in enumerate(train):
        first.setdefault(_text_of(example), i)
    pairs = [(i, first[text]) for i, text in enumerate(map(_text_of, examples)) if text in first]
    if not pairs:
        return
    own, others = _some([str(i) for i, _ in pairs]), _some([str(j) for _, j in pairs])
    warnings.warn(
        f"{len(pairs)} of {len(examples)} rows of eval_data have the text of a row of train_data: rows {own} of "
        f"eval_data are rows {others} of train_data. Scores on them say little about new rows. Leave them out of one "
        "of the two.",
        ScalaBLWarning,
        stacklevel=stacklevel_outside(),
    )


def _warn_of_new_classes(train: Sequence[Example], examples: Sequence[Example], classes: Sequence[ClassName]) -> None:
    """Warn of classes that held-out rows have, and no training row has."""
    trained = {label for example in train for label in _labels_of(example)}
    new = Counter(label for example in examples for label in _labels_of(example) if label not in trained)
    if not new:
        return
    named = _some(
        [f"{classes[int(target)]!r} ({count} row{'s' if count > 1 else ''})" for target, count in sorted(new.items())]
    )
    warnings.warn(
        f"eval_data has answers that no row of train_data has: {named}. They cannot be learned, so their NLL is high "
        "whatever the settings are. Add such rows to train_data, or split the rows anew, at random.",
        ScalaBLWarning,
        stacklevel=stacklevel_outside(),
    )


def _labels_of(example: Example) -> list[int]:
    """Indices of the classes of a row: one, or those that are marked with 1."""
    target = example.target
    return [k for k, value in enumerate(target) if value == 1] if isinstance(target, tuple) else [target]


def _text_of(example: Example) -> str:
    """All tokens of a row: those of the text, and those of the answer if it is a text."""
    return json.dumps([example.inputs, example.target if isinstance(example.target, list) else None])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
