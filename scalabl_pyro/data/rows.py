"""Rows from files, from data sets of the hub by name, or as they are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..storage import json_reader

Row = Mapping[str, Any]

#: Bytes of a line of a JSONL file; longer ones are no rows, and would fill the memory.
MAX_LINE = 2**26


def read_rows(source: str | Path | Iterable[Row], *, split: str = "train", **load_options: Any) -> list[Row]:
    """Rows of a JSONL file, of a Hugging Face data set by name, or of anything that iterates over dicts.

    Known multiple-choice data sets of the hub are brought to one form, see :func:`as_question`.

    Args:
        source: path of a ``.jsonl`` file, hub name such as ``"allenai/openbookqa"``, or the rows themselves.
        split: split of a hub data set.
        load_options: passed to ``datasets.load_dataset`` (``name=...`` for a configuration).

    Raises:
        FileNotFoundError: a ``.jsonl`` path that does not exist.
        ValueError: a line that is not a JSON object (with its number), or no rows at all.
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
        raise FileNotFoundError(f"{path} does not exist (a name ending in .jsonl is read as a local file).")
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(raw) > MAX_LINE:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE} bytes; one row a line is expected.")
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
    """``row`` as ``{"question", "choices": [str, ...], "answer": int or None}`` where its schema is a known one.

    Known are OpenBookQA and ARC (``choices`` with texts and labels, ``answerKey``), WinoGrande (``sentence``,
    ``option1``, ``option2``), BoolQ (a boolean ``answer``, a ``passage``), and MMLU, which has the form already. Any
    other row is returned as it is.
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
