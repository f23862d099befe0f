"""Folders that are whole or absent.

What is written lies beside its place until all of it is on the disk, and is then renamed: a reader, or a machine that
lost power, finds the old folder or the new one.
"""

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, which takes its place when the context ends well, and is gone otherwise.

    Where the system can exchange two folders (Linux), one that was there is replaced in one step; elsewhere by two
    renames, the first of which is undone should the second fail.
    """
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    os.mkdir(staging)
    try:
        yield staging
        sync(staging)
        _move_into_place(staging, path)
    except BaseException:
        _remove(staging)
        raise


def sync(folder: Path) -> None:
    """Bring all files of a folder to the disk, and then what names them."""
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
    """Write a new file, and return when it is on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def _move_into_place(staging: Path, path: Path) -> None:
    if not path.exists():
        os.replace(staging, path)
    elif exchange(staging, path):
        _remove(staging)  # the old one, under the name of the new
    else:
        old = staging.with_name(staging.name + "-old")
        os.replace(path, old)
        try:
            os.replace(staging, path)
        except BaseException:
            os.replace(old, path)
            raise
        _remove(old)
    _sync_names(path.parent)


def exchange(a: Path, b: Path) -> bool:
    """Let two paths of one file system change places in one step; False where the system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    here, exchange_flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(exchange_flag)) == 0


def _remove(folder: Path) -> None:
    for _ in range(2):  # a passing error is no reason to leave litter
        shutil.rmtree(folder, ignore_errors=True)


def _sync_names(folder: Path) -> None:
    """As far as the file system can; some cannot do it for folders, and Windows cannot open them."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
