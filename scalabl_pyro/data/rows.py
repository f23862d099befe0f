"""Rows: dicts from a JSONL file, from a Hugging Face data set, or from any iterable.

A task turns each row into an :class:`~scalabl_pyro.data.Example`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..storage import json_reader

Row = Mapping[str, Any]

#: Allowed bytes per line of a JSONL file, so that a file without line ends cannot fill the memory.
MAX_LINE = 2**26


def read_rows(source: str | Path | Iterable[Row], *, split: str = "train", **load_options: Any) -> list[Row]:
    """Read the rows of a JSONL file, a Hugging Face data set, or an iterable of dicts.

    Rows of known multiple-choice data sets from the hub are converted to one form, see :func:`as_question`.

    Args:
        source: Path of a ``.jsonl`` file, hub name such as ``"allenai/openbookqa"``, or the rows themselves.
        split: Split of a hub data set.
        load_options: Options of ``datasets.load_dataset``, such as ``name="ARC-Easy"`` for a configuration.

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: The ``.jsonl`` file does not exist.
        TypeError: ``source`` is a single dict, or is not iterable.
        ValueError: A line is not a JSON object, or the data has no rows.

    Example:
        >>> import pathlib, tempfile
        >>> from scalabl_pyro.data import read_rows
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "train.jsonl"
        >>> _ = file.write_text('{"text": "the sky is blue", "label": 1}')
        >>> read_rows(file)
        [{'text': 'the sky is blue', 'label': 1}]
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix in (".jsonl", ".json") or path.is_file():
            rows = _read_jsonl(path)
        else:
            from datasets import load_dataset

            rows = [as_question(row) for row in load_dataset(str(source), split=split, **load_options)]
    else:
        if isinstance(source, Mapping) or not isinstance(source, Iterable):
            raise TypeError(f"Expected rows (a list of dicts, a Dataset, a path), got a {type(source).__name__}.")
        rows = list(source)
    if not rows:
        raise ValueError(f"{source if isinstance(source, str | Path) else 'The data set'} has no rows.")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. A name that ends in .jsonl or .json is read as a local file.")
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(raw) > MAX_LINE:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE} bytes; expected one row per line.")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error}).") from None
            if not line.strip():
                continue
            try:
                row = json_reader.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows


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
        answer = int(row["answer"]) - 1 if row.get("answer") in ("1", "2") else None
        return _question(row, row["sentence"], [row["option1"], row["option2"]], answer)
    if isinstance(row.get("answer"), bool) and "passage" in row:
        question = f"{row['passage']}\n{row['question'].capitalize().rstrip('?')}?"
        return _question(row, question, ["yes", "no"], 0 if row["answer"] else 1)
    return row


def _question(row: Row, question: Any, choices: list[str], answer: int | None) -> Row:
    known = {"question": question, "choices": choices, "answer": answer}
    return {**({"id": row["id"]} if "id" in row else {}), **known}
