"""Tensors in safetensors files: written, read as untrusted input, and compared with what they must be."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import torch as safe
from torch import Tensor, nn

from . import directories, json_reader, untrusted_files
from .budget import Budget

#: Bytes of a file's header, which lists the tensors. Models with thousands of layers need less than 1 MiB.
MAX_HEADER = 4 * 2**20
#: Allowed types of numbers, with the bytes of a number.
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
#: Types of floating-point numbers, which may be infinite.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Bytes that are scanned at a time.
PIECE = 2**24
#: Largest number of dimensions of a tensor.
MAX_DIMS = 8

Value = TypeVar("Value")


def below(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Return the entries whose names begin with ``prefix``, without the prefix.

    Example:
        >>> below({"guide.loc": 1, "prior.scale": 2}, "guide.")
        {'loc': 1}
    """
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the names of floating-point tensors that hold NaN or infinity.

    Example:
        >>> import torch
        >>> not_finite({"loc": torch.zeros(2), "scale": torch.tensor([1.0, torch.inf])})
        ['scale']
    """
    return [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, finite: bool = True) -> None:
    """Write tensors to a new file.

    Args:
        file: The file.
        tensors: Tensors by name.
        finite: Whether all floating-point numbers must be finite.

    Raises:
        ValueError: A tensor does not hold finite real numbers.
    """
    if finite and (bad := not_finite(tensors)):
        raise ValueError(
            f"{file.name} is not written, because {bad[0]!r} holds NaN or infinity. Nothing was saved. Use the "
            "posterior of an earlier step, or train again with smaller learning rates."
        )
    # Contiguous copies: safetensors refuses tensors that share memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    directories.write_file(file, safe.save(own))


def read_tensors(
    folder: Path, name: str, *, budget: Budget, limit: int | None = None, finite: bool = True
) -> dict[str, Tensor]:
    """Read the tensors of a file, as copies that do not depend on the file.

    The size of each tensor is compared with the size of the file, and with the budget, before the tensors are read.

    Args:
        folder: Folder of the file.
        name: Name of the file in ``folder``.
        budget: Budget that the bytes and the numbers are drawn from.
        limit: Largest allowed size of the file in bytes, if there is one besides the budget.
        finite: Whether all floating-point numbers must be finite.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not a complete safetensors file, exceeds the budget, or a tensor does not hold finite
            real numbers.
    """
    file = folder / name
    entries = read_entries(folder, name)
    budget.spend("numbers", sum(math.prod(entry.shape) for entry in entries.values()), file)
    content = untrusted_files.read_file(folder, name, limit=limit, budget=budget)
    try:
        tensors = safe.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(_damaged(file, error)) from None
    if finite and (bad := not_finite(tensors)):
        raise ValueError(f"{file}: tensor {bad[0]!r} holds values that are not finite real numbers.")
    return tensors


def scan_tensors(folder: Path, name: str, *, budget: Budget) -> dict[str, "TensorEntry"]:
    """Check that all numbers of a file are finite, in pieces, so that a large file takes little memory.

    Args:
        folder: Folder of the file.
        name: Name of the file in ``folder``.
        budget: Budget that the bytes are drawn from.

    Returns:
        Type, shape and place of each tensor.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not a complete safetensors file, exceeds the budget, or a tensor does not hold finite
            real numbers.
    """
    file, entries = folder / name, read_entries(folder, name)
    real = untrusted_files.find_file(folder, name)
    size = real.stat().st_size
    budget.spend("bytes", size, file)
    first = size - sum(entry.size for entry in entries.values())
    with real.open("rb") as content:
        for key, entry in entries.items():
            content.seek(first + entry.start)
            left = entry.size if entry.dtype in FLOATING else 0
            while left:
                piece = bytearray(content.read(min(left, PIECE)))
                if not piece or not torch.isfinite(torch.frombuffer(piece, dtype=FLOATING[entry.dtype])).all():
                    raise ValueError(f"{file}: tensor {key!r} holds values that are not finite real numbers.")
                left -= len(piece)
    return entries


class TensorEntry(NamedTuple):
    """What the list at the beginning of a file says about a tensor.

    Attributes:
        dtype: Name of the type of numbers, one of :data:`DTYPES`.
        shape: The shape.
        start: Position of its first byte after the list.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return DTYPES[self.dtype] * math.prod(self.shape)


def read_entries(folder: Path, name: str) -> dict[str, TensorEntry]:
    """Read only the names, types and shapes of the tensors of a file, and compare their sizes with that of the file.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The list is damaged, or the file has another size than the tensors in it.
    """
    real, file = untrusted_files.find_file(folder, name), folder / name
    size = real.stat().st_size
    try:
        with real.open("rb") as content:
            start = content.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8:
                raise ValueError(f"the header should have {length} bytes, the file has {size}")
            if length > MAX_HEADER:
                raise ValueError(f"the header has {length} bytes, more than the allowed {MAX_HEADER}")
            header = json_reader.loads(content.read(length))
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(file, error)) from None
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError(_damaged(file, "the header does not list tensors"))
    entries = {key: _entry(file, key, entry) for key, entry in header.items() if key != "__metadata__"}
    data = sum(entry.size for entry in entries.values())
    if data != size - 8 - length:
        raise ValueError(_damaged(file, f"its tensors have {data} bytes, the file has {size - 8 - length} for them"))
    return entries


def _entry(file: Path, key: str, entry: Mapping[str, Any]) -> TensorEntry:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{file}: tensor {key!r} has the type {dtype!r}; allowed types: {tuple(DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        shown = repr(shape)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise ValueError(
            _damaged(file, f"tensor {key!r} has the shape {shown}; expected up to {MAX_DIMS} whole numbers from 0 on")
        )
    offsets = entry.get("data_offsets")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise ValueError(_damaged(file, f"tensor {key!r} has no place in the file"))
    found = TensorEntry(dtype, tuple(shape), offsets[0])
    if offsets[1] != found.start + found.size:
        raise ValueError(_damaged(file, f"tensor {key!r} has another size than its place in the file"))
    return found


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def check_keys(what: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError unless a file holds exactly the expected names."""
    if found != expected:
        missing, surplus = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise ValueError(
            f"{what} does not hold the tensors that its configuration asks for: missing {missing}, "
            f"unexpected {surplus}."
        )


def check_like(what: str, saved: Tensor, own: Tensor) -> None:
    """Raise ValueError unless ``saved`` can replace ``own``: the same shape, and both floating-point or one dtype."""
    if saved.shape != own.shape:
        raise ValueError(f"{what} is {tuple(saved.shape)}, expected {tuple(own.shape)}.")
    if saved.dtype != own.dtype and not (saved.is_floating_point() and own.is_floating_point()):
        raise ValueError(f"{what} is {saved.dtype}, expected {own.dtype}.")


def check_state(what: str, saved: Mapping[str, Tensor], module: nn.Module) -> None:
    """Raise ValueError unless ``saved`` has the names, shapes and types of the state of ``module``.

    Floating-point tensors may be saved in another precision, but all of them in the same one: a matrix product of two
    precisions fails, perhaps only in a draw of one component of a mixture.
    """
    own = module.state_dict()
    check_keys(what, set(saved), set(own))
    first: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for name, tensor in saved.items():
        check_like(f"{what}: {name!r}", tensor, own[name])
        like, dtype = first.setdefault(own[name].dtype, (name, tensor.dtype))
        if tensor.dtype != dtype:
            raise ValueError(
                f"{what}: {name!r} is {tensor.dtype} and {like!r} is {dtype}: both must be saved in one precision."
            )


def load_strict(what: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load exactly these tensors into a module, in the precision in which they were saved.

    Raises:
        ValueError: A name, shape or type differs from the state of ``module``, see :func:`check_state`.
    """
    check_state(what, tensors, module)
    module.load_state_dict(tensors, assign=True)


def _damaged(file: Path, error: object) -> str:
    return f"{file} is damaged: it is not a whole safetensors file ({error})."
