"""The table of the quality benchmark: one JSON line a run, appended whole, so that it can be killed at any time."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: What tells one run from another; everything else in a row is its outcome.
IDENTITY = ("dataset", "method", "seed", "split", "settings")


def run_key(row: Mapping[str, Any]) -> str:
    """Digest of what identifies a run."""
    return _digest({name: row[name] for name in IDENTITY})


def setting_key(row: Mapping[str, Any]) -> str:
    """Digest of the settings, which all seeds of a line of the report share."""
    return _digest(row["settings"])[:8]


class Table:
    """The runs of a folder. Each process appends to a file of its own, and reads those of all.

    A line is written by one call and synced to the disk. A broken last line, which a killed process leaves, is cut off
    before the next one is written, and is no row.

    Args:
        folder: of the table.
        shard: (i, n) for the i-th of n processes that share the work.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        name = "table.jsonl" if shard == (0, 1) else f"table-{shard[0]}-of-{shard[1]}.jsonl"
        self.path = folder / name
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """All runs of the folder, each once, in the order in which they were written."""
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
    """Rows of a file; a last line that is broken is left out.

    Raises:
        ValueError: a broken line before the last one.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): remove that line.") from None
    del rest  # what stands behind the last line break was not written to its end
    return rows


def _cut_broken_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    if whole < size:
        file.truncate(whole)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
