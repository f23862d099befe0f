"""Rows: dicts from a file, from a Hugging Face data set, or from any container of rows.

A task turns each row into an :class:`~scalabl_pyro.data.Example`.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._arguments import kind_of, known_arguments
from .._errors import describe
from .._values import integer, number, plain
from .containers import EXPECTED, as_rows
from .named_rows import Row, read_named, refuse_load_options
from .row_form import ANY_FORM, RowForm, form_for

#: Kinds of objects that hold no rows, and what to pass instead.
NO_ROWS = {
    "blora": "fit(blora, task, train_data) takes the rows third.",
    "task": "The rows follow the task: fit(blora, task, train_data).",
    "posterior": "posterior.predict(data) takes the rows.",
    "result": "result.posterior.predict(data) takes the rows.",
    "prediction": "Pass the rows that were predicted.",
    "tokenizer": "The task holds the tokenizer: MultipleChoice(tokenizer).",
    "llm": "fit(bayesian_lora(llm), task, train_data) takes the rows third.",
    "batch": "A batch is read by fit only, in a list: [batch, ...].",
    "class": "Pass the rows themselves.",
}


def read_rows(
    source: str | os.PathLike[str] | Iterable[Row], *, split: str = "train", **load_options: Any
) -> list[Row]:
    """Read the rows of a file, a table, a Hugging Face data set, or an iterable of dicts.

    Rows of known multiple-choice data sets from the hub are converted to one form, see :func:`as_question`.

    Args:
        source: Path of a ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.json`` file, ``"hf://owner/name"`` for a
            data set of the hub, or the rows: an iterable of dicts, a dict of columns, a ``datasets.Dataset``, a pandas
            or polars DataFrame, a pyarrow table, a NumPy structured array, or a map-style torch Dataset. Files other
            than Parquet may be compressed (``.csv.gz``). Any other string is refused, so that a text never leaves the
            machine as the name of a data set.
        split: Split of a hub data set.
        load_options: Options of ``datasets.load_dataset``, such as ``name="ARC-Easy"`` for a configuration.

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: The file does not exist.
        TypeError: ``source`` is a single row, a list of texts, several splits, or no container, or it is not a hub
            data set while there are load options.
        ValueError: ``source`` is a text or a folder, a file does not have the form that its name says, or there are no
            rows.

    Example:
        >>> import pathlib, tempfile
        >>> from scalabl_pyro.data import read_rows
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = file.write_text('{"text": "the sky is blue", "label": 1}')
        >>> read_rows(file)
        [{'text': 'the sky is blue', 'label': 1}]
    """
    return _read(source, ANY_FORM, split, load_options)


def rows_for(encode_row: Callable[..., Any], source: Any, *, split: str = "train") -> list[Row]:
    """Read rows for a task. Errors name the fields that this task reads.

    Args:
        encode_row: The task's method ``encode``.
        source: Rows in any form that :func:`read_rows` takes.
        split: Split of a hub data set.

    Raises:
        FileNotFoundError, TypeError, ValueError: As for :func:`read_rows`.

    Example:
        >>> from scalabl_pyro.data.rows import rows_for
        >>> rows_for(lambda row: row, [{"text": "the sky"}])
        [{'text': 'the sky'}]
    """
    return _read(source, form_for(encode_row), split, {})


def _read(source: Any, form: RowForm, split: str, load_options: Mapping[str, Any]) -> list[Row]:
    if isinstance(source, str | os.PathLike):
        rows = read_named(source, as_question, split=split, load_options=load_options)
    else:
        refuse_load_options(load_options)
        _refuse_other_objects(source)
        rows = as_rows(source, form)
    if not rows:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "The data set"
        raise ValueError(f"{name} has no rows.")
    return rows


def _refuse_other_objects(source: Any) -> None:
    """Raise TypeError if an object that users mix up with rows was given."""
    if way := NO_ROWS.get(kind_of(source)):
        raise TypeError(f"{EXPECTED}, got {describe(source)}. {way}")


@known_arguments
def as_question(row: Row) -> Row:
    """Convert a row of a known data set to ``{"question": str, "choices": [str, ...], "answer": int or None}``.

    Known fields are those of OpenBookQA and ARC (``choices`` with texts and labels, ``answerKey``), WinoGrande
    (``sentence``, ``option1``, ``option2``) and BoolQ (``passage``, boolean ``answer``). MMLU has the form already. Any
    other row is returned unchanged.

    Args:
        row: Row of a data set.

    Example:
        >>> from scalabl_pyro.data import as_question
        >>> as_question({"sentence": "_ is blue.", "option1": "Grass", "option2": "The sky", "answer": "2"})
        {'question': '_ is blue.', 'choices': ['Grass', 'The sky'], 'answer': 1}
    """
    choices = row.get("choices")
    if isinstance(choices, Mapping) and {"text", "label"} <= set(choices):
        labels, key = list(choices["label"]), row.get("answerKey")
        question = row.get("question_stem", row.get("question"))
        return _question(row, question, list(choices["text"]), labels.index(key) if key in labels else None)
    if {"sentence", "option1", "option2"} <= set(row):
        option = integer(number(row.get("answer"), from_text=True))
        answer = option - 1 if option in (1, 2) else None
        return _question(row, row["sentence"], [row["option1"], row["option2"]], answer)
    if isinstance(plain(row.get("answer")), bool) and "passage" in row:
        question = f"{row['passage']}\n{row['question'].capitalize().rstrip('?')}?"
        return _question(row, question, ["yes", "no"], 0 if row["answer"] else 1)
    return row


def _question(row: Row, question: Any, choices: list[str], answer: int | None) -> Row:
    known = {"question": question, "choices": choices, "answer": answer}
    return {**({"id": row["id"]} if "id" in row else {}), **known}
