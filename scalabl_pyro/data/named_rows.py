"""Rows that are given by name: the path of a JSONL file, or a data set of the Hugging Face Hub.

A string is never guessed to be the name of a hub data set. It may be a confidential text that was passed by mistake,
and a request to the hub would publish it.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._errors import describe
from ..storage import json_reader
from .containers import EXPECTED, as_rows

Row = Mapping[str, Any]

#: Begins the name of a data set of the hub.
HUB = "hf://"
#: Files with these ends hold one JSON object per line.
SUFFIXES = (".jsonl", ".ndjson", ".json")
#: Allowed bytes per line of a JSONL file, so that a file without line ends cannot fill the memory.
MAX_LINE = 2**26

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def read_named(
    name: str | os.PathLike[str], convert: Callable[[Row], Row], *, split: str, load_options: Mapping[str, Any]
) -> list[Row]:
    """Read the rows of a file or of a data set of the hub.

    Args:
        name: Path of a file that ends in ``.jsonl``, ``.ndjson`` or ``.json``; or ``hf://owner/name``.
        convert: Function that is applied to the rows of a hub data set.
        split: Split of a hub data set.
        load_options: Further options of ``datasets.load_dataset``, for a hub data set.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: ``name`` is a folder, a text, or a file that is not JSONL.
        TypeError: There are options of ``load_dataset``, but ``name`` is a file.
    """
    text = os.fspath(name)
    if isinstance(name, str) and text.startswith(HUB):
        return [convert(row) for row in as_rows(_load_from_hub(text, {"split": split, **load_options}))]
    refuse_load_options(load_options)
    path = Path(name)
    if path.suffix.lower() in SUFFIXES and not _exists(path.is_dir):
        return read_jsonl(path)
    raise ValueError(_refusal(text, path))


def refuse_load_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError if there are options that only a data set of the hub has."""
    if options:
        raise TypeError(f"{list(options)} are options of a data set of the hub, 'hf://owner/name'. Leave them out.")


def _load_from_hub(name: str, options: Mapping[str, Any]) -> Any:
    """Load the data set ``hf://owner/name``.

    Raises:
        ValueError: The name is not one of the hub, or ``datasets`` would read a local folder instead.
    """
    repository = name.removeprefix(HUB).removeprefix("datasets/")
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"Expected a data set of the hub, 'hf://owner/name', got {describe(name)}.")
    if _exists(Path(repository).exists):
        raise ValueError(
            f"{name!r}: a local file or folder {repository!r} exists too, and datasets would read that one. Run in "
            "another folder, or pass the rows that datasets.load_dataset(...) gives."
        )
    from datasets import load_dataset

    return load_dataset(repository, **options)


def _refusal(text: str, path: Path) -> str:
    """Say why a name is not read, and what to pass instead."""
    if text and _exists(path.is_dir):
        return (
            f"{text!r} is a folder, and its files may be several data sets. Pass the path of one .jsonl file, or the "
            "rows that datasets.load_from_disk(...) or datasets.load_dataset(...) gives."
        )
    if _exists(path.is_file):
        return (
            f"{text!r} is a file, but its name does not end in {', '.join(SUFFIXES)} (one JSON object per line). Read "
            "it yourself and pass the rows: a list of dicts, or a datasets.Dataset."
        )
    hub = f" For a data set of the hub write 'hf://{text}'." if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
    return f"{EXPECTED}, got {describe(text)}.{hub} A text goes into a row, such as [{{'text': ...}}]."


def _exists(check: Callable[[], bool]) -> bool:
    """Ask the file system. A long text or one with a null byte cannot be a path."""
    try:
        return check()
    except (OSError, ValueError):
        return False


def read_jsonl(path: Path) -> list[Row]:
    """Read a file with one JSON object per line.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not a JSON object.
    """
    if not _exists(path.is_file):
        raise FileNotFoundError(
            f"{path} does not exist. A name that ends in {', '.join(SUFFIXES)} is read as a local file."
        )
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(raw) > MAX_LINE:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE} bytes; expected one row per line.")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error}). Save the file in UTF-8.") from None
            if not line.strip():
                continue
            try:
                row = json_reader.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}). Expected one JSON object per line."
                ) from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}.")
            rows.append(row)
    return rows
