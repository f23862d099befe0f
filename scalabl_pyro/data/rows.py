"""Rows from files, from data sets of the hub by name, or as they are."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..storage import json_reader as strict_json
from .hub_rows import Row, as_question

#: Bytes of a line of a JSONL file; longer ones are no rows, and would fill the memory.
MAX_LINE = 2**26


def read_rows(source: str | Path | Iterable[Row], *, split: str = "train", **load_options: Any) -> list[Row]:
    """Rows of a JSONL file, of a Hugging Face data set by name, or of anything that iterates over dicts.

    Known multiple-choice data sets of the hub are brought to one form, see :mod:`scalabl_pyro.data.hub_rows`.

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
                row = strict_json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows
