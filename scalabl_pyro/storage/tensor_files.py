"""Tensors in safetensors files: written, read as untrusted input, and compared with what they must be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import torch as safe
from torch import Tensor, nn

from . import directories, json_reader, untrusted_files

#: Bytes of a file's header, which lists the tensors. Models with thousands of layers need less than 1 MiB.
MAX_HEADER = 4 * 2**20
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")

Value = TypeVar("Value")


def below(values: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """Return the entries whose names begin with ``prefix``, without the prefix.

    Example:
        >>> below({"guide.loc": 1, "prior.scale": 2}, "guide.")
        {'loc': 1}
    """
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, finite: bool = True) -> None:
    """Write tensors to a new file.

    Args:
        file: The file.
        tensors: Tensors by name.
        finite: Whether all floating-point numbers must be finite.

    Raises:
        ValueError: A tensor does not hold finite real numbers.
    """
    for name, tensor in tensors.items() if finite else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{file.name} is not written, because {name!r} holds NaN or infinity. Nothing was saved. Use the "
                "posterior of an earlier step, or train again with smaller learning rates."
            )
    # Contiguous copies: safetensors refuses tensors that share memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    directories.write_file(file, safe.save(own))


def read_tensors(folder: Path, name: str, *, limit: int, finite: bool = True) -> dict[str, Tensor]:
    """Read the tensors of a file, as copies that do not depend on the file.

    Args:
        folder: Folder of the file.
        name: Name of the file in ``folder``.
        limit: Largest allowed size of the file, in bytes.
        finite: Whether all floating-point numbers must be finite.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not a complete safetensors file, or a tensor does not hold finite real numbers.
    """
    content = untrusted_files.read_file(folder, name, limit=limit)
    file = folder / name
    try:
        header = _header(content)
    except ValueError as error:
        raise ValueError(_damaged(file, error)) from None
    for key, entry in header.items():
        if key != "__metadata__" and entry.get("dtype") not in DTYPES:
            raise ValueError(f"{file}: tensor {key!r} has the type {entry.get('dtype')!r}; allowed types: {DTYPES}.")
    try:
        tensors = safe.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(_damaged(file, error)) from None
    for key, tensor in tensors.items() if finite else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {key!r} holds values that are not finite real numbers.")
    return tensors


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


def _damaged(file: Path, error: Exception) -> str:
    return f"{file} is damaged: it is not a whole safetensors file ({error})."


def _header(content: bytes) -> dict[str, Any]:
    """Read the list of tensors at the beginning of a file; each name may stand there once."""
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError(f"the header should have {size} bytes, the file has {len(content)}")
    if size > MAX_HEADER:
        raise ValueError(f"the header has {size} bytes, more than the allowed {MAX_HEADER}")
    header = json_reader.loads(content[8 : 8 + size])
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("the header does not list tensors")
    return header
