"""Files of strangers, read with limits and only inside of their directory."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHUNK = 2**20


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file under ``folder``, by path relative to it."""
    return {f.relative_to(folder).as_posix(): describe(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def describe(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


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


def find_folder(folder: Path, name: str) -> Path:
    """The directory ``name`` of ``folder``, under that path; links may not lead out of ``folder``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it lies outside of ``folder``.
    """
    if not _inside(folder / name, folder).is_dir():
        raise FileNotFoundError(f"{folder / name} is missing.")
    return folder / name


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
