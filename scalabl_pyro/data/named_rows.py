"""Rows that are given by name: the path of a file, or a data set of the Hugging Face Hub.

A string is never guessed to be the name of a hub data set. It may be a confidential text that was passed by mistake,
and a request to the hub would publish it.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._errors import describe
from .containers import EXPECTED, as_rows
from .table_files import SUFFIXES, Row, kind_of_file, read_table_file

#: Begins the name of a data set of the hub.
HUB = "hf://"
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


def read_named(
    name: str | os.PathLike[str], convert: Callable[[Row], Row], *, split: str, load_options: Mapping[str, Any]
) -> list[Row]:
    """Read the rows of a file or of a data set of the hub.

    Args:
        name: Path of a CSV, TSV, Parquet, JSON or JSONL file; or ``hf://owner/name``.
        convert: Function that is applied to the rows of a hub data set.
        split: Split of a hub data set.
        load_options: Further options of ``datasets.load_dataset``, for a hub data set.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: ``name`` is a folder, a text, or a file of another form.
        TypeError: There are options of ``load_dataset``, but ``name`` is a file.
    """
    text = os.fspath(name)
    if isinstance(name, str) and text.startswith(HUB):
        return [convert(row) for row in as_rows(_load_from_hub(text, {"split": split, **load_options}))]
    refuse_load_options(load_options)
    path = Path(name)
    if kind_of_file(path) and not _exists(path.is_dir):
        if not _exists(path.is_file):
            raise FileNotFoundError(
                f"{path} does not exist. A name that ends in {', '.join(SUFFIXES)} is read as a local file."
            )
        return read_table_file(path)
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
            f"{text!r} is a file, but its name does not end in {', '.join(SUFFIXES)}. Read it yourself and pass the "
            "rows: a list of dicts, a datasets.Dataset, or a DataFrame, such as pandas.read_excel(path)."
        )
    hub = f" For a data set of the hub write 'hf://{text}'." if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
    return f"{EXPECTED}, got {describe(text)}.{hub} A text goes into a row, such as [{{'text': ...}}]."


def _exists(check: Callable[[], bool]) -> bool:
    """Ask the file system. A long text or one with a null byte cannot be a path."""
    try:
        return check()
    except (OSError, ValueError):
        return False
