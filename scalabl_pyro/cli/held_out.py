"""Held-out rows of the command ``fit``: those of a second table, or a share of the table that is trained on."""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._errors import ScalaBLWarning, nearest
from .._values import is_missing, number
from ..data.encoding import encode
from ..data.labels import class_index
from ..data.row_form import form_for
from ..data.rows import Row, read_rows
from ..data.split import stratified_split
from ..tasks.base import Task
from ..tasks.label_completion import LabelCompletion
from ..tasks.multi_label import MultiLabelClassification
from ..tasks.text import SequenceClassification

#: Largest number of names in a message.
MAX_NAMED = 5
#: Tasks whose rows have one class each, in the field ``target``.
ONE_CLASS = (LabelCompletion, SequenceClassification)


@dataclass(frozen=True)
class HeldOut:
    """Rows to train on, and rows that are only scored.

    Attributes:
        train: Rows to train on.
        rows: Held-out rows; None if there are none.
        origin: Where the held-out rows come from, in words.
        whole: All rows of the table, if the held-out rows are a share of them; else empty.
    """

    train: list[Row]
    rows: list[Row] | None
    origin: str = ""
    whole: tuple[Row, ...] = ()


def check_options(given: str | None, **others: int | None) -> None:
    """Check the options of held-out rows before a file is read.

    Args:
        given: Value of ``--eval``.
        others: Further options, which need it.

    Raises:
        ValueError: ``--eval`` is a number outside (0, 1), or it is missing and another option needs it.
    """
    if given is None:
        for name, value in others.items():
            if value is not None:
                option = f"--{name.replace('_', '-')} {value}"
                raise ValueError(
                    f"{option} needs held-out rows: add --eval valid.csv, a table of rows with answers that are not in "
                    "the training table, or --eval 0.2, which holds out a fifth of it."
                )
        return
    share = number(given.removesuffix("%"), from_text=True)
    if share is not None and (given.endswith("%") or not 0 < share < 1):
        raise ValueError(
            f"--eval {given}: give a share between 0 and 1, such as 0.2 for a fifth of the rows, or the name of a "
            "table."
        )


def hold_out(rows: list[Row], given: str | None, task: Task, *, data: str, seed: int) -> HeldOut:
    """Read the held-out rows, or choose them.

    Args:
        rows: Rows of the table.
        given: Name of a second table, or a share as a text; None for no held-out rows.
        task: The task, which knows the fields and the classes.
        data: Name of the table.
        seed: Seed of the choice.

    Returns:
        Both parts. A share is chosen at random; if each row has one class, each class has this share.

    Raises:
        OSError, ValueError: The second table cannot be read, lacks a column, or has a class that the first one lacks;
            or the share leaves one part empty.
    """
    if given is None:
        return HeldOut(rows, None)
    share = number(given, from_text=True)
    if share is None:
        others = read_rows(given, split="validation")
        _check_columns(rows, others, task, names=(data, given))
        _check_classes(others, task, names=(data, given))
        return HeldOut(rows, others, given)
    by = _class_field(task)
    if by is not None:
        train, others = stratified_split(rows, by=by, share=float(share), seed=seed)
        how = f"the same share of each class in {by!r}"
    else:
        order = np.random.default_rng(seed).permutation(len(rows))
        chosen = set(order[: round(float(share) * len(rows))].tolist())
        train = [row for i, row in enumerate(rows) if i not in chosen]
        others, how = [rows[i] for i in sorted(chosen)], "chosen at random"
    train, others, num_moved = _keep_twins_together(train, others, task)
    if not train or not others:
        equal = f", and {num_moved} held-out rows have the text of another row" if num_moved else ""
        raise ValueError(
            f"--eval {given}: {data} has {len(rows)} rows{equal}, so one part would be empty. Give more rows."
        )
    twins = f"; {num_moved} more with the text of another row are trained on" if num_moved else ""
    return HeldOut(train, others, f"a share of {given} of {data}, {how}, seed {seed}{twins}", tuple(rows))


@contextlib.contextmanager
def in_words_of_the_command(held_out: HeldOut, task: Task, *, data: str, given: str | None) -> Iterator[None]:
    """Name files instead of arguments of ``fit`` in its warnings and errors, and rows by their place in the table."""
    names = {"eval_data": given if not held_out.whole and given else "the held-out rows", "train_data": data}

    def renamed(text: object) -> str:
        return re.sub(r"\b(eval_data|train_data)\b", lambda found: names[found[0]], str(text))

    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_renamed(message: Any, category: Any, *place: Any, **more: Any) -> None:
            text = category(renamed(message)) if issubclass(category, ScalaBLWarning) else message
            show(text, category, *place, **more)

        warnings.showwarning = show_renamed
        try:
            yield
        except (ValueError, TypeError) as error:
            if held_out.whole:  # the same error with the row's place in the table, if it is an error of a row
                encode(held_out.whole, task.encode, need_target=True)
            if renamed(error) == str(error):
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(renamed(error)) from error


def _check_columns(rows: list[Row], others: list[Row], task: Task, *, names: tuple[str, str]) -> None:
    """Refuse a second table without a column that the task reads in the first."""
    there = dict.fromkeys(name for row in others for name in row)
    read = [name for name in task.row_fields if any(name in row for row in rows)]
    if lacking := [name for name in read if name not in there]:
        raise ValueError(
            f"{names[1]} has no column {' and no column '.join(map(repr, lacking))}, which {names[0]} has. Its columns "
            f"are {', '.join(map(repr, there))}. Give the columns of both tables the same names."
        )


def _check_classes(others: list[Row], task: Task, *, names: tuple[str, str]) -> None:
    """Refuse classes that stand only in the second table, as no step can learn them."""
    by = _class_field(task)
    if by is None:
        return
    found = Counter(str(row[by]) for row in others if not is_missing(row.get(by)) and not _is_known(row[by], task))
    if not found:
        return
    named = [f"{name!r} ({count} row{'s' if count > 1 else ''})" for name, count in found.most_common(MAX_NAMED)]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    hint = nearest(next(iter(found)), map(str, task.classes or ()))
    raise ValueError(
        f"{names[1]} has classes in {by!r} that no row of {names[0]} has: {', '.join(named)}{more}. They cannot be "
        f"learned. {hint} Correct them, add such rows to {names[0]}, or leave them out of {names[1]}."
    )


def _keep_twins_together(train: list[Row], others: list[Row], task: Task) -> tuple[list[Row], list[Row], int]:
    """Move held-out rows whose text is trained on to the other part, because they say little about new rows."""
    names = form_for(task.encode).texts

    def text(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in names)

    trained = {text(row) for row in train} if names else set()
    twins = [row for row in others if text(row) in trained]
    return [*train, *twins], [row for row in others if text(row) not in trained], len(twins)


def _class_field(task: Task) -> str | None:
    """Name of the column of the class; None for tasks whose rows do not have one class each."""
    is_one = isinstance(task, ONE_CLASS) and not isinstance(task, MultiLabelClassification)
    return task.target if is_one else None


def _is_known(value: Any, task: Task) -> bool:
    try:
        class_index(value, task.classes or ())
    except ValueError:
        return False
    return True
