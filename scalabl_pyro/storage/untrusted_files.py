"""Untrusted files: found only inside their own folder, and read only up to a size limit."""

import os
from pathlib import Path


def find_file(folder: Path, name: str) -> Path:
    """Find the regular file ``name`` of ``folder``, and follow links that stay inside it.

    Raises:
        FileNotFoundError: The path does not exist, or is not a regular file.
        ValueError: The file lies outside ``folder``.
    """
    file = folder / name
    real = _inside(file, folder)
    if not real.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    return real


def find_folder(folder: Path, name: str) -> Path:
    """Find the directory ``name`` of ``folder``; links must not lead out of ``folder``.

    Raises:
        FileNotFoundError: The path does not exist, or is not a directory.
        ValueError: The directory lies outside ``folder``.
    """
    if not _inside(folder / name, folder).is_dir():
        raise FileNotFoundError(f"{folder / name} is missing.")
    return folder / name


def read_file(folder: Path, name: str, *, limit: int) -> bytes:
    """Read a file of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is larger than ``limit``, or lies outside ``folder``.
    """
    file = find_file(folder, name)
    # A memory map would crash the process if another process shortened the file meanwhile.
    with file.open("rb") as content:
        if (size := os.fstat(content.fileno()).st_size) > limit:
            raise ValueError(f"{folder / name} has {size} bytes, more than the {limit} that are allowed here.")
        return content.read(size)


def check_tree(folder: Path, *, limit: int) -> None:
    """Check that ``folder`` holds only regular files and directories, all inside it, and at most ``limit`` bytes.

    Raises:
        FileNotFoundError: ``folder`` is missing.
        ValueError: A link leads out of ``folder``, an entry is a pipe or a device, or the files have more bytes than
            ``limit`` together.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing.")
    total = 0
    for entry in [folder, *folder.rglob("*")]:  # rglob does not follow links to directories
        real = _inside(entry, folder.parent)
        if real.is_dir():
            continue
        if not real.is_file():
            raise ValueError(f"{entry} is not a regular file.")
        total += real.stat().st_size
    if total > limit:
        raise ValueError(f"{folder} has {total} bytes, more than the {limit} that are allowed here.")


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
