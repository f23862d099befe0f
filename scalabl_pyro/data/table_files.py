"""Files that hold a table: CSV, TSV, Parquet, lines of JSON, and a JSON array."""

import csv
import gzip
import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .._values import is_code
from ..storage import json_reader
from .containers import as_rows

Row = Mapping[str, Any]

#: Files with these ends hold one JSON object per line.
LINES = (".jsonl", ".ndjson", ".json")
#: Files with these ends hold one row per line, and the character that stands between two columns.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
#: Files with these ends are Parquet files.
PARQUET = (".parquet", ".pq")
#: All of them. A file of lines may be compressed, ``.jsonl.gz``.
SUFFIXES = (*LINES, *SEPARATORS, *PARQUET)
#: Allowed bytes per line of a JSONL file, so that a file without line ends cannot fill the memory.
MAX_LINE = 2**26
#: Allowed number of values in a JSON array.
MAX_ARRAY_VALUES = 2**26


def kind_of_file(path: Path) -> str:
    """Return the end of a file's name that says its form, without ``.gz``; an empty text if none does.

    Example:
        >>> kind_of_file(Path("notes.csv")), kind_of_file(Path("NOTES.jsonl.gz")), kind_of_file(Path("notes.xlsx"))
        ('.csv', '.jsonl', '')
    """
    last = path.suffix.lower()
    if last == ".gz":
        last = Path(path.stem).suffix.lower()
        return last if last in SUFFIXES and last not in PARQUET else ""
    return last if last in SUFFIXES else ""


def read_table_file(path: Path) -> list[Row]:
    """Read the rows of a file. Its name says its form, see :func:`kind_of_file`.

    An empty cell of a CSV file is a missing value. The words ``NA``, ``None`` and ``null`` are texts, because they may
    be the names of classes. Codes such as ``007``, and whole numbers with more than 15 digits, are texts too.

    Args:
        path: Path of a file that exists.

    Raises:
        ValueError: The content does not have the form.
    """
    kind = kind_of_file(path)
    if kind in PARQUET:
        return _read_parquet(path)
    if kind in SEPARATORS:
        return _read_separated(path, SEPARATORS[kind])
    try:
        with _opened(path) as file:
            begin = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        return _read_array(path) if kind == ".json" and begin.startswith(b"[") else _read_lines(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}).") from None


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_separated(path: Path, separator: str) -> list[Row]:
    """Read a CSV or TSV file with pandas."""
    try:
        _check_separator(path, separator)
        _check_quotes(path, separator)
        # With a header, pandas would take the first field of each row as an index where rows have one field more.
        cells = pd.read_csv(
            path, sep=separator, header=None, keep_default_na=False, na_values=[""], encoding="utf-8-sig", dtype=str
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Save the file in UTF-8.") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a table ({str(error).strip()}). Expected a line of names, and one row per line. A text that "
            f"holds {separator!r} stands in quotation marks."
        ) from None
    columns = [name if isinstance(name, str) else f"Unnamed: {i}" for i, name in enumerate(cells.iloc[0])]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"{path}: several columns are named {twice[0]!r}. Give each column its own name.")
    return as_rows(cells[1:].set_axis(columns, axis=1).apply(_typed))


def _check_separator(path: Path, separator: str) -> None:
    """Check that the names in the first line are separated by the mark that the ending of the file tells.

    Raises:
        ValueError: They seem to be separated by another mark.
    """
    with _opened(path) as file:
        names = file.readline(10_000).decode("utf-8", "replace").removeprefix("\ufeff").strip()
    mark = next((mark for mark in (";", "\t", ",", "|") if mark in names), None)
    if separator not in names and mark is not None:
        raise ValueError(
            f"{path} has one column, {names!r}: its columns seem to be separated by {mark!r}. Read it with table = "
            f"pandas.read_csv(path, sep={mark!r}), and pass the table, or write a file with commas: "
            "table.to_csv(other_path, index=False)."
        )


def _check_quotes(path: Path, separator: str) -> None:
    """Check that each quotation mark that closes a field ends it.

    pandas reads on after such a mark. It would drop the mark, or join the rows up to the next mark.

    Raises:
        ValueError: A text follows a closing mark.
    """
    with _opened(path) as raw:
        lines = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), delimiter=separator, strict=True)
        try:
            for _ in lines:
                pass
        except csv.Error as error:
            if "expected after" in str(error):  # pandas says what else is wrong, and reads longer fields than csv
                raise ValueError(
                    f"{path}, line {lines.line_num}: a field goes on after its closing quotation mark. Write a mark "
                    "inside a quoted text twice. If the marks of the file have no meaning, read it with "
                    f"pandas.read_csv(path, sep={separator!r}, quoting=3), and pass the table."
                ) from None


def _typed(column: Any) -> Any:
    """Return a column of texts as numbers or truth values, where all of them are written so.

    Codes such as ``007`` and long whole numbers stay texts: as numbers they would name other classes.
    """
    known = column.dropna()
    if known.empty or known.map(is_code).any():
        return column
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers[known.index].notna().all():
        return numbers
    truth = column.str.lower().map({"true": True, "false": False})
    return truth if truth[known.index].notna().all() else column


def _read_parquet(path: Path) -> list[Row]:
    """Read a Parquet file. Names of classes that ``datasets`` wrote into it are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        return as_rows(Dataset(pq.read_table(path)))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file ({error}).") from None


def _read_array(path: Path) -> list[Row]:
    """Read a file that holds one JSON array of objects."""
    with _opened(path) as file:
        content = file.read()
    try:
        rows = json_reader.loads(content.decode("utf-8-sig"), max_values=MAX_ARRAY_VALUES)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). Expected an array of objects, or one object per line.") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, item {i}: expected a JSON object, got {type(row).__name__}.")
    return rows


def _read_lines(path: Path) -> list[Row]:
    """Read a file with one JSON object per line.

    Raises:
        ValueError: A line is not a JSON object.
    """
    rows: list[Row] = []
    with _opened(path) as file:
        for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            row = _parsed(raw, f"{path}, line {number}", is_first=number == 1)
            if row is not None:
                rows.append(row)
    return rows


def _parsed(raw: bytes, where: str, *, is_first: bool) -> Row | None:
    """Return the row of a line, or None for a blank line."""
    if len(raw) > MAX_LINE:
        raise ValueError(f"{where}: longer than {MAX_LINE} bytes; expected one row per line.")
    try:
        line = raw.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}). Save the file in UTF-8.") from None
    if not line.strip():
        return None
    try:
        row = json_reader.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}). Expected one JSON object per line.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return row
