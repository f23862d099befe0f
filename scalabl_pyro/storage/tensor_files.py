"""Tensors in safetensors files: written plainly, read as if by a stranger."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safe
from torch import Tensor

from . import directories, json_reader, untrusted_files

#: Bytes of the list of tensors; thousands of layers need less than one MiB.
MAX_HEADER = 4 * 2**20
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a new file, contiguous copies: safetensors refuses those that share memory."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    directories.write_file(file, safe.save(own))


def read_tensors(folder: Path, name: str, *, limit: int, finite: bool = True) -> dict[str, Tensor]:
    """Real tensors of a file of at most ``limit`` bytes, as copies that do not depend on it; all finite, if asked.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: no whole safetensors file, or a tensor that is not of finite real numbers.
    """
    content = untrusted_files.read_file(folder, name, limit=limit)
    file = folder / name
    try:
        header = _header(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: not a whole safetensors file ({error}).") from None
    for key, entry in header.items():
        if key != "__metadata__" and entry.get("dtype") not in DTYPES:
            raise ValueError(f"{file}: tensor {key!r} has the type {entry.get('dtype')!r}; known are {DTYPES}.")
    try:
        tensors = safe.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{file} is damaged: not a whole safetensors file ({error}).") from None
    for key, tensor in tensors.items() if finite else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {key!r} holds values that are not finite real numbers.")
    return tensors


def _header(content: bytes) -> dict[str, Any]:
    """The list of tensors at the beginning of the file: each name once."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError(f"a header of {size} bytes in {len(content)}")
    if size > MAX_HEADER:
        raise ValueError(f"a header of {size} bytes, more than {MAX_HEADER}")
    header = json_reader.loads(content[8 : 8 + size])
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("a header that lists no tensors")
    return header


def check_keys(what: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError unless a file holds exactly what it should."""
    if found != expected:
        missing, surplus = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise ValueError(f"{what} does not hold what its configuration says: missing {missing}, unexpected {surplus}.")


def check_like(what: str, saved: Tensor, own: Tensor) -> None:
    """Raise ValueError unless a tensor has the shape and the kind of numbers of the one it is to replace."""
    if saved.shape != own.shape:
        raise ValueError(f"{what} is {tuple(saved.shape)}, expected {tuple(own.shape)}.")
    if saved.dtype != own.dtype and not (saved.is_floating_point() and own.is_floating_point()):
        raise ValueError(f"{what} is {saved.dtype}, expected {own.dtype}.")
