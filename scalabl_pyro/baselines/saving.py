"""Baselines on disk: a directory of JSON and safetensors that holds the posteriors it is made of.

baseline.json           kind and options
tensors.safetensors     where there are any
NAME/                   a posterior, or again a baseline
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._errors import nearest
from .._process.lock import LOCK
from ..lora.attach import find_adapter
from ..posterior.config import CONFIG_FILE
from ..posterior.posterior import Posterior
from ..posterior.serialization import MIN_LIMIT, errors_name
from ..storage import json_reader
from ..storage.directories import staged, write_file
from ..storage.tensor_files import read_tensors, write_tensors
from ..storage.untrusted_files import check_file, describe_files, find_file, find_folder, read_file
from .predictor import Predictor

CONFIG = "baseline.json"
TENSORS = "tensors.safetensors"
FORMAT_VERSION = 1
MAX_BYTES = 2**20
#: Baselines of baselines, such as an ensemble that is scaled by a temperature.
MAX_DEPTH = 4

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
    with staged(path) as folder:
        if tensors:
            write_tensors(folder / TENSORS, tensors)
        own = describe_files(folder)
        for name, child in children.items():
            child.save_pretrained(folder / name)
        content = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "options": options,
            "children": list(children),
            "files": own,
        }
        write_file(folder / CONFIG, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


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
    path = Path(path)
    with LOCK, errors_name(path):
        carried = find_adapter(llm)
        try:
            return _load(llm, path, overrides, depth=0)
        except BaseException:
            adapter = find_adapter(llm)
            if carried is None and adapter is not None:
                adapter.unload()
            raise


def _load(llm: nn.Module, path: Path, overrides: Mapping[str, Any], *, depth: int) -> Predictor:
    if not (path / CONFIG).exists():
        if (path / CONFIG_FILE).exists():
            return Posterior.from_pretrained(llm, path, **overrides)
        raise FileNotFoundError(f"{path} holds neither a posterior ({CONFIG_FILE}) nor a baseline ({CONFIG}).")
    if depth >= MAX_DEPTH:
        raise ValueError(f"{path}: a baseline of baselines deeper than {MAX_DEPTH}.")
    kind, options, names, described = _read(path)
    children = {name: _load(llm, find_folder(path, name), overrides, depth=depth + 1) for name in names}
    tensors = {}
    if TENSORS in described:
        limit = max(MIN_LIMIT, 8 * sum(p.numel() for p in llm.parameters()))
        tensors = read_tensors(path, TENSORS, limit=limit)
    try:
        baseline = KINDS[kind](options, tensors, children)
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {type(error).__name__} {error}.") from error
    for name, expected in described.items():
        check_file(path, name, expected)
    return baseline


def _read(folder: Path) -> tuple[str, dict[str, Any], list[str], dict[str, Any]]:
    file = folder / CONFIG
    find_file(folder, CONFIG)
    try:
        content = json_reader.loads(read_file(folder, CONFIG, limit=MAX_BYTES))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: not JSON ({error}).") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{file}: this version of scalabl_pyro reads format_version {FORMAT_VERSION}.")
    kind, options, names, described = (content.get(key) for key in ("kind", "options", "children", "files"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{file}: kind={kind!r} is unknown. {nearest(str(kind), KINDS)}")
    if not isinstance(options, dict) or not isinstance(names, list) or not all(map(_is_folder_name, names)):
        raise ValueError(f"{file} is damaged: 'options' must be an object and 'children' names of folders.")
    if not isinstance(options.get("provenance", {}), dict):
        raise ValueError(f"{file} is damaged: 'provenance' must be an object.")
    if len(set(names)) < len(names):
        raise ValueError(f"{file} is damaged: 'children' names a folder twice.")
    entries = described.values() if isinstance(described, dict) and set(described) <= {TENSORS} else [None]
    if not all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in entries):
        raise ValueError(f"{file} is damaged: 'files' must give the size and SHA-256 of {TENSORS}, if there is one.")
    assert isinstance(described, dict)
    return kind, options, names, described


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii()
