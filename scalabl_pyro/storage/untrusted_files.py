"""Untrusted files: found only inside their own folder, and read only up to a size limit."""

import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from .budget import Budget


def find_file(folder: Path, name: str) -> Path:
    """Find the regular file ``name`` of ``folder``, and follow links that stay inside it.

    Raises:
        FileNotFoundError: The path does not exist, or is not a regular file.
        ValueError: The file lies outside ``folder``.
    """
    file = folder / name
    real = _inside(file, folder)
    if not _ask(real.is_file, file):
        raise FileNotFoundError(f"{file} is missing.")
    return real


def find_folder(folder: Path, name: str) -> Path:
    """Find the directory ``name`` of ``folder``; links must not lead out of ``folder``.

    Raises:
        FileNotFoundError: The path does not exist, or is not a directory.
        ValueError: The directory lies outside ``folder``.
    """
    if not _ask(_inside(folder / name, folder).is_dir, folder / name):
        raise FileNotFoundError(f"{folder / name} is missing.")
    return folder / name


def read_file(folder: Path, name: str, *, limit: int | None = None, budget: Budget | None = None) -> bytes:
    """Read a file of at most ``limit`` bytes.

    Args:
        folder: Folder of the file.
        name: Name of the file in ``folder``.
        limit: Largest allowed size, in bytes; None for no limit but that of the budget.
        budget: Budget that the bytes are drawn from.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is larger than ``limit`` or than the budget allows, cannot be read, or lies outside
            ``folder``.
    """
    file = find_file(folder, name)
    # A memory map would crash the process if another process shortened the file meanwhile.
    try:
        with file.open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            if limit is not None and size > limit:
                raise ValueError(f"{folder / name} has {size} bytes, more than the {limit} that are allowed here.")
            if budget is not None:
                budget.spend("bytes", size, folder / name)
            return content.read(size)
    except OSError as error:
        raise ValueError(f"{folder / name} cannot be read ({error}).") from None


def check_tree(folder: Path, *, limit: int, budget: Budget) -> list[Path]:
    """Check that ``folder`` holds only regular files and directories, all inside it, and at most ``limit`` bytes.

    Args:
        folder: The folder.
        limit: Largest allowed size of all files together, in bytes.
        budget: Budget that the files are drawn from.

    Returns:
        The regular files.

    Raises:
        FileNotFoundError: ``folder`` is missing.
        ValueError: A link leads out of ``folder``, an entry is a pipe or a device, or the files have more bytes than
            ``limit`` together.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing.")
    total, files = 0, []
    for entry in chain([folder], folder.rglob("*")):  # rglob does not follow links to directories
        budget.spend("files", 1, folder)
        real = _inside(entry, folder.parent)
        if real.is_dir():
            continue
        if not real.is_file():
            raise ValueError(f"{entry} is not a regular file.")
        files.append(entry)
        total += real.stat().st_size
    if total > limit:
        raise ValueError(f"{folder} has {total} bytes, more than the {limit} that are allowed here.")
    return files


def _ask(question: Callable[[], bool], file: Path) -> bool:
    """Answer a question to the system about a path; a name that is too long for it is damage, not an accident."""
    try:
        return question()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error}).") from None


def _inside(file: Path, folder: Path) -> Path:
    """Resolve ``file``, which must lie inside ``folder``; files of the Hugging Face cache may lie in its blobs."""
    try:
        real, root = file.resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a null byte, a name that is too long
        raise ValueError(f"{file} cannot be read ({error}).") from None
    # The cache keeps contents in blobs/, and links to them in snapshots/<revision>/.
    in_cache = root.parent.name == "snapshots"
    roots = [root, root.parent.parent / "blobs"] if in_cache else [root]
    if not any(real.is_relative_to(r) for r in roots):
        raise ValueError(f"{file} leads out of its directory, to {real}: only files inside the directory are read.")
    return real
