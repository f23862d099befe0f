"""The table of the quality benchmark: one JSON line per run, written so that the process may be killed at any time."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Columns that identify a run. All other columns are its outcome.
IDENTITY = ("dataset", "method", "seed", "split", "settings")


def run_key(row: Mapping[str, Any]) -> str:
    """Compute a digest of the columns that identify a run."""
    return _digest({name: row[name] for name in IDENTITY})


def setting_key(row: Mapping[str, Any]) -> str:
    """Compute a digest of the settings, which all seeds of one line of the report share."""
    return _digest(row["settings"])[:8]


class Table:
    """Runs of a folder. Each process appends to its own file and reads the files of all processes.

    A line is written with one call and synced to the disk. A killed process may leave a broken last line. It is not
    read as a row, and is cut off before the next line is written.

    Args:
        folder: Folder of the table.
        shard: (i, n) for process i of n that share the work.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        name = "table.jsonl" if shard == (0, 1) else f"table-{shard[0]}-of-{shard[1]}.jsonl"
        self.path = folder / name
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """Read all runs of the folder, each once, in the order in which they were written."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("table*.jsonl")):
            for row in read(path):
                found.setdefault(run_key(row), row)
        return list(found.values())

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a run to the disk."""
        line = json.dumps(row, allow_nan=True) + "\n"
        with self.path.open("ab+") as file:
            _cut_broken_line(file)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file without a broken last line.

    Raises:
        ValueError: A line before the last one is broken.
    """
    *whole, _ = path.read_bytes().split(b"\n")  # The part after the last line break is empty or broken.
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): remove that line.") from None
    return rows


def _cut_broken_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    if whole < size:
        file.truncate(whole)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
