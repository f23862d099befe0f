"""Folders that are written completely or not at all.

A new folder is written inside a hidden one, see :mod:`.unfinished`. When all its files are on the disk, it is renamed.
A reader therefore finds the old folder or the complete new one, even after a power failure.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .unfinished import former_content, holder, new_content


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a new folder that replaces ``path`` when the context ends, and is deleted if the context raises an error.

    On Linux, an existing folder is replaced in one step. On other systems it is replaced by two renames; if the second
    one fails, the first one is undone.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "saved"
        >>> with staged(path) as folder:
        ...     write_file(folder / "a.txt", b"hello")
        >>> (path / "a.txt").read_text()
        'hello'
    """
    with holder(path) as folder:
        staging = new_content(folder)
        os.mkdir(staging)
        yield staging
        sync(staging)
        _move_into_place(staging, path, old=former_content(folder))


def sync(folder: Path) -> None:
    """Write all files of a folder to the disk, then the directories that name them."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    for inner in (*(f for f in folder.rglob("*") if f.is_dir()), folder):
        _sync_names(inner)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, and return when its content is on the disk.

    Raises:
        FileExistsError: ``path`` exists.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that others may read: it has its old content or its new one, never a part.

    Args:
        path: Path of the file.
        data: Its content.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        write_file(part, data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _move_into_place(staging: Path, path: Path, *, old: Path) -> None:
    if not path.exists():
        os.replace(staging, path)
    elif not exchange(staging, path):  # after an exchange, the name of the new folder belongs to the old one
        os.replace(path, old)
        try:
            os.replace(staging, path)
        except BaseException:
            os.replace(old, path)
            raise
    _sync_names(path.parent)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two paths of one file system in one step.

    Returns:
        Whether they were exchanged. False where the system cannot do it.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    at_fdcwd, rename_exchange = -100, 2  # constants of the Linux headers
    return rename(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), ctypes.c_uint(rename_exchange)) == 0


def _sync_names(folder: Path) -> None:
    """Write the names in a directory to the disk, where the system can."""
    with suppress(OSError):  # some file systems cannot sync a directory, and Windows cannot open one
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
