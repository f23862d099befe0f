"""Manifest: size and SHA-256 of each file of a folder, to detect files that changed after they were written."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from .._arguments import MAX_NAME
from .budget import Budget
from .untrusted_files import find_file

#: Bytes that are read and hashed at a time.
CHUNK = 2**20


class Entry(NamedTuple):
    """What a manifest records about one file.

    Attributes:
        bytes: Size of the file.
        sha256: Hexadecimal SHA-256 of its content.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Size and SHA-256 of files, by path relative to their folder.

    Attributes:
        entries: Entry of each file, by its path with forward slashes.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("hello")
        >>> manifest = Manifest.of_folder(folder)
        >>> manifest.entries["a.txt"].bytes
        5
        >>> manifest.check(folder)  # raises an error if a file is missing or was changed
    """

    entries: Mapping[str, Entry]

    @classmethod
    def of_folder(cls, folder: Path) -> "Manifest":
        """Record every file under ``folder``."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return cls({f.relative_to(folder).as_posix(): Entry(f.stat().st_size, _sha256(f)) for f in files})

    @classmethod
    def from_json(cls, value: object, *, names: Collection[str] | None = None) -> "Manifest":
        """Read a manifest from its JSON form, which may come from an untrusted file.

        Args:
            value: The JSON form, see :meth:`to_json`. Other keys of an entry than ``bytes`` and ``sha256`` are ignored.
            names: Paths that the manifest may list. ``None`` allows any path inside the folder.

        Raises:
            ValueError: ``value`` does not have this form, or lists another path.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"'files' must be an object, found {type(value).__name__}.")
        return cls({name: _entry(name, entry, names) for name, entry in value.items()})

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return the JSON form, ``{path: {"bytes": int, "sha256": str}}``."""
        return {name: entry._asdict() for name, entry in self.entries.items()}

    def check(self, folder: Path, *, budget: Budget | None = None) -> None:
        """Compare every file with its entry.

        Args:
            folder: Folder of the files.
            budget: Budget that files and their bytes are drawn from.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file has changed since it was recorded, or exceeds the budget.
        """
        for name in self.entries:
            self.check_file(folder, name, budget=budget)

    def check_file(self, folder: Path, name: str, *, budget: Budget | None = None) -> None:
        """Compare one file with its entry. Its size is compared before it is read.

        Args:
            folder: Folder of the file.
            name: Path of the file in ``folder``.
            budget: Budget that the file and its bytes are drawn from.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The file has changed since it was recorded, or exceeds the budget.
        """
        file, expected = find_file(folder, name), self.entries[name]
        size = file.stat().st_size
        if size != expected.bytes:
            raise ValueError(f"{folder / name} has changed since it was saved: {size} bytes, not {expected.bytes}.")
        if budget is not None:
            budget.spend("files", 1, folder / name)
            budget.spend("bytes", size, folder / name)
        if _sha256(file) != expected.sha256:
            raise ValueError(f"{folder / name} has changed since it was saved: its SHA-256 is another.")


def _entry(name: str, value: object, names: Collection[str] | None) -> Entry:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise ValueError(f"'files' names {name!r}, which is not a path inside the directory.")
    if name != path.as_posix():  # one file would stand under many names
        raise ValueError(f"'files' names {name!r}; write it as {path.as_posix()!r}.")
    if max(len(part.encode("utf-8", "replace")) for part in path.parts) > MAX_NAME:
        raise ValueError(f"'files' names {name[:60]!r}..., a name of more than {MAX_NAME} bytes.")
    if names is not None and name not in names:
        raise ValueError(f"'files' names {name!r}; expected only {sorted(names)}.")
    if not isinstance(value, Mapping):
        raise ValueError(f"'files' must give an object for {name!r}, found {type(value).__name__}.")
    size, digest = value.get("bytes"), value.get("sha256")
    if not isinstance(size, int) or isinstance(size, bool) or not isinstance(digest, str):
        raise ValueError(f"'files' must give 'bytes' (int) and 'sha256' (str) for {name!r}, found {dict(value)}.")
    return Entry(size, digest)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
