"""Directories that appear whole or not at all, and files of strangers that are read with limits."""

import ctypes
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHUNK = 2**20


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """A new directory to fill, which then takes the place of ``path``; on any error nothing has changed.

    It is made beside the target, so that the last step is one rename within a file system, and everything in it is on
    disk before that step. Where the system can exchange two directories (Linux), a directory that was there is replaced
    in one step; elsewhere by two renames, the first of which is undone should the second fail.
    """
    path = path.resolve()  # write through links
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        yield staging
        for file in sorted(staging.rglob("*"), reverse=True):  # what a directory holds before the directory
            sync(file)
        sync(staging)
        _move_into_place(staging, path)
    except BaseException:
        _remove(staging)
        raise
    with suppress(OSError):  # it is there, whatever else fails
        sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file to the disk; of a directory its list of names, where the file system can do that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if stat.S_ISDIR(os.fstat(handle).st_mode) else _nothing():
            os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file.

    Raises:
        FileExistsError: there is one.
    """
    with path.open("xb") as file:
        file.write(content)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file under ``folder``, by path relative to it."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Compare a file with what :func:`describe_files` said of it when it was written.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it has changed since.
    """
    file = find_file(folder, name)
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{folder / name} has changed since it was saved: {size} bytes, not {expected['bytes']}.")
    if sha256(file) != expected["sha256"]:
        raise ValueError(f"{folder / name} has changed since it was saved: its SHA-256 is another.")


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def find_file(folder: Path, name: str) -> Path:
    """The regular file ``name`` of ``folder``, wherever in it links lead.

    Raises:
        FileNotFoundError: there is none, or something that is no file.
        ValueError: it lies outside of ``folder``.
    """
    file = folder / name
    real = _inside(file, folder)
    if not real.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    return real


def read_file(folder: Path, name: str, *, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is larger, or lies outside of ``folder``.
    """
    file = find_file(folder, name)
    with file.open("rb") as content:  # no memory map, which would crash should the file be cut meanwhile
        if (size := os.fstat(content.fileno()).st_size) > limit:
            raise ValueError(f"{folder / name} has {size} bytes, more than the {limit} that it can need.")
        return content.read(size)


def check_tree(folder: Path, *, limit: int) -> None:
    """Check that everything under ``folder`` is a regular file or directory inside of it, ``limit`` bytes in all.

    Raises:
        FileNotFoundError: ``folder`` is missing.
        ValueError: a link that leads out, a pipe or device, or more bytes than ``limit``.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing.")
    total = 0
    for entry in [folder, *folder.rglob("*")]:  # rglob follows no links to directories
        real = _inside(entry, folder.parent)
        if real.is_dir():
            continue
        if not real.is_file():
            raise ValueError(f"{entry} is no regular file.")
        total += real.stat().st_size
    if total > limit:
        raise ValueError(f"{folder} has {total} bytes, more than the {limit} that it can need.")


def _inside(file: Path, folder: Path) -> Path:
    """Where ``file`` really lies: in ``folder``, or among the blobs if that is a snapshot in the Hugging Face cache."""
    try:
        real, root = file.resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null byte, a name that is too long
        raise ValueError(f"{file} cannot be read ({error}).") from None
    in_cache = root.parent.name == "snapshots"
    roots = [root, root.parent.parent / "blobs"] if in_cache else [root]
    if not any(real.is_relative_to(r) for r in roots):
        raise ValueError(f"{file} leads out of its directory, to {real}: only files inside of it are read.")
    return real


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _move_into_place(staging: Path, path: Path) -> None:
    if not path.exists():
        os.replace(staging, path)
        return
    if exchange(staging, path):
        _remove(staging)  # the old one, under the name of the new
        return
    old = staging.with_name(staging.name + "-old")
    os.replace(path, old)
    try:
        os.replace(staging, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    for _ in range(2):  # a passing error is no reason to leave litter
        shutil.rmtree(folder, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Let two paths of one file system change places in one step; False where the system has no such step."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    here, exchange_flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(exchange_flag)) == 0
