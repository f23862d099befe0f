"""Folders that are whole or absent, and strict reading of tensors.

What is written lies beside its place until all of it is on the disk, and is then renamed: a reader, or a machine that
lost power, finds the old folder or the new one.
"""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, which takes its place when the context ends well, and is gone otherwise."""
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    os.mkdir(staging)
    try:
        yield staging
        sync(staging)
        _move_into_place(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
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


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors."""
    write_file(path, to_bytes(own(tensors)))


def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses tensors that share memory."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def read_tensors(file: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or (``finite``) holds values that are not finite real numbers.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        # Copies: safetensors maps the file, which may change while the tensors are in use.
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: not a whole safetensors file ({error}).") from None
    for name, tensor in tensors.items() if finite else ():
        if tensor.is_complex() or (tensor.is_floating_point() and not torch.isfinite(tensor).all()):
            raise ValueError(f"{file}: tensor {name!r} holds values that are not finite real numbers.")
    return tensors


def check_keys(what: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError unless a file holds exactly what it should."""
    if found != expected:
        missing, surplus = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise ValueError(f"{what} does not hold what its configuration says: missing {missing}, unexpected {surplus}.")


def check_like(what: str, saved: Tensor, own: Tensor) -> None:
    """Raise ValueError unless a tensor has the shape and the kind of numbers of the one it is to replace."""
    if saved.shape != own.shape:
        raise ValueError(f"{what} is {tuple(saved.shape)}, expected {tuple(own.shape)}.")
    if saved.is_floating_point() != own.is_floating_point():
        raise ValueError(f"{what} is {saved.dtype}, expected {own.dtype}.")


def _move_into_place(staging: Path, path: Path) -> None:
    if not path.exists():
        os.replace(staging, path)
    else:
        old = staging.with_name(staging.name + "-old")
        os.replace(path, old)
        try:
            os.replace(staging, path)
        except BaseException:
            os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    """As far as the file system can; some cannot do it for folders, and Windows cannot open them."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
