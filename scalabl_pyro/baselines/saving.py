"""Baselines on disk: a directory of JSON and safetensors that holds the posteriors it is made of.

baseline.json           kind and options
tensors.safetensors     where there are any
NAME/                   a posterior, or again a baseline
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import saved_config
from .._errors import nearest
from ..attach import find_adapter
from ..posterior import Posterior
from .predictor import Predictor

CONFIG = "baseline.json"
TENSORS = "tensors.safetensors"
FORMAT_VERSION = 1
MAX_BYTES = 2**20

Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Any]], Predictor]
"""(options, tensors, children) -> the baseline."""

#: Filled in by the package, see ``__init__.py``.
KINDS: dict[str, Reader] = {}


def save(
    path: str | Path,
    kind: str,
    options: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    children: Mapping[str, Predictor],
) -> None:
    """Write a baseline to the directory ``path``; one that was there is replaced whole, or kept whole.

    Raises:
        FileExistsError: ``path`` holds something else.
    """
    path = Path(path).resolve()
    if path.exists() and not (path / CONFIG).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and holds no baseline: give the path of a new directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    try:
        content = {"format_version": FORMAT_VERSION, "kind": kind, "options": options, "children": list(children)}
        (staging / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if tensors:
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, staging / TENSORS)
        for name, child in children.items():
            child.save_pretrained(staging / name)
        old = path.with_name(staging.name + "-old")
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(staging, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def load(llm: nn.Module, path: str | Path, **overrides: Any) -> Predictor:
    """Read back what a posterior or a baseline saved.

    Args:
        llm: the base model it was learned on; a failed load leaves it as it was.
        path: directory that ``save_pretrained`` wrote.
        overrides: ``task=``, ``prior=`` or ``guide=`` where a saved one is a class of your own.

    Raises:
        FileNotFoundError: nothing was saved there.
        ValueError: another base model, or a damaged file.
    """
    carried = find_adapter(llm)
    try:
        return _load(llm, Path(path), overrides)
    except BaseException:
        adapter = find_adapter(llm)
        if carried is None and adapter is not None:
            adapter.unload()
        raise


def _load(llm: nn.Module, path: Path, overrides: Mapping[str, Any]) -> Predictor:
    if not (path / CONFIG).is_file():
        if (path / saved_config.NAME).is_file():
            return Posterior.from_pretrained(llm, path, **overrides)
        raise FileNotFoundError(f"{path} holds neither a posterior ({saved_config.NAME}) nor a baseline ({CONFIG}).")
    kind, options, names = _read(path / CONFIG)
    tensors = _read_tensors(path / TENSORS)
    children = {name: _load(llm, path / name, overrides) for name in names}
    try:
        return KINDS[kind](options, tensors, children)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {type(error).__name__} {error}.") from None


def _read(file: Path) -> tuple[str, dict[str, Any], list[str]]:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, more than any configuration needs.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: not JSON ({error}).") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file}: this version of scalabl_pyro reads format_version {FORMAT_VERSION}.")
    kind, options, names = (content.get(key) for key in ("kind", "options", "children"))
    if kind not in KINDS:
        raise ValueError(f"{file}: kind={kind!r} is unknown. {nearest(str(kind), KINDS)}")
    if not isinstance(options, dict) or not isinstance(names, list) or not all(map(_is_folder_name, names)):
        raise ValueError(f"{file} is damaged: 'options' must be an object and 'children' names of folders.")
    return str(kind), options, names


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        return {}
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: not a whole safetensors file ({error}).") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: tensor {name!r} holds values that are not finite real numbers.")
    return tensors
