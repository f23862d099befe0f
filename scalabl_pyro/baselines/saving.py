"""A baseline as a directory of JSON and safetensors files, with the posteriors that it consists of in subdirectories.

baseline.json           kind, options, names of the subdirectories
tensors.safetensors     tensors of the baseline, if it has any
NAME/                   a posterior, or another baseline
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._arguments import check_path, check_role
from .._errors import nearest
from .._process.lock import LOCK
from ..lora.module_snapshot import ModuleSnapshot
from ..posterior.config import CONFIG_FILE
from ..posterior.posterior import Posterior
from ..posterior.serialization import path_in_errors
from ..storage import json_reader
from ..storage.budget import Budget
from ..storage.directories import staged, write_file
from ..storage.manifest import MAX_NAME, Manifest
from ..storage.tensor_files import read_tensors, write_tensors
from ..storage.untrusted_files import find_folder, read_file
from .predictor import Predictor

CONFIG = "baseline.json"
TENSORS = "tensors.safetensors"
FORMAT_VERSION = 1
#: Largest allowed size of ``baseline.json``.
MAX_BYTES = 2**20
#: Allowed levels of nested baselines. A temperature-scaled ensemble has two.
MAX_DEPTH = 4
#: The default budget allows as much as this number of posteriors beside the base model.
POSTERIORS = 4

Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], Mapping[str, Any]], Predictor]
"""Function ``(options, tensors, children) -> baseline``."""

#: Reader of each kind of baseline. ``baselines/__init__.py`` fills it.
KINDS: dict[str, Reader] = {}


def save(
    path: str | Path,
    kind: str,
    options: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    children: Mapping[str, Predictor],
) -> None:
    """Write a baseline to a directory.

    A baseline that was saved there before is replaced completely, or kept completely if writing fails.

    Args:
        path: Directory, created if it does not exist.
        kind: Key of the baseline's reader in :data:`KINDS`.
        options: Options of the baseline, as JSON can hold them.
        tensors: Tensors of the baseline itself.
        children: Posteriors and baselines that it consists of, by the name of their subdirectory.

    Raises:
        FileExistsError: ``path`` holds something else.
        ValueError: A name in ``path`` is too long.
    """
    check_path("path", path)
    path = Path(path).resolve()
    if path.exists() and not (path / CONFIG).exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and does not hold a baseline: give the path of a new directory.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as folder:
        if tensors:
            write_tensors(folder / TENSORS, tensors)
        own = Manifest.of_folder(folder)  # each child writes a manifest of its own
        for name, child in children.items():
            child.save_pretrained(folder / name)
        content = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "options": options,
            "children": list(children),
            "files": own.to_json(),
        }
        write_file(folder / CONFIG, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def load(llm: nn.Module, path: str | Path, **overrides: Any) -> Predictor:
    """Load a saved posterior or baseline.

    Args:
        llm: Base model that it was learned on. If loading fails, the model stays as it was.
        path: Directory that ``save_pretrained`` wrote.
        overrides: ``task=``, ``prior=`` or ``guide=``, to replace a saved part whose class is your own. ``budget=``, a
            :class:`~scalabl_pyro.storage.budget.Budget`, for files that are larger than the default allows. All parts
            of the baseline draw from it together.

    Returns:
        The posterior or the baseline.

    Raises:
        FileNotFoundError: The directory holds neither.
        ValueError: The base model is another one, or a file is damaged or too large.

    Example:
        Save what ``mle`` learned, and load it again for the same base model::

            point = scalabl_pyro.baselines.mle(llm, task, rows)
            point.save_pretrained("mle")
            point = scalabl_pyro.baselines.load(llm, "mle")
    """
    check_role("llm", llm, "llm", call="load(llm, path)")
    check_path("path", path)
    path, snapshot = Path(path), ModuleSnapshot(llm)
    try:
        with LOCK, path_in_errors(path):
            if overrides.get("budget") is None:
                parameters = sum(p.numel() for p in llm.parameters())
                overrides = {**overrides, "budget": Budget.beside(POSTERIORS * parameters)}
            return _load(llm, path, overrides, seen=set(), depth=0)
    except BaseException:
        snapshot.restore()
        raise


def _load(llm: nn.Module, path: Path, overrides: Mapping[str, Any], *, seen: set[Path], depth: int) -> Predictor:
    budget, real = overrides["budget"], path.resolve()
    budget.spend("members", 1, path)
    if real in seen:
        raise ValueError(f"{path} is the same folder as another part of the baseline: each part has its own folder.")
    seen.add(real)
    if not (path / CONFIG).exists():
        if (path / CONFIG_FILE).exists():
            return Posterior.from_pretrained(llm, path, **overrides)
        raise FileNotFoundError(f"{path} holds neither a posterior ({CONFIG_FILE}) nor a baseline ({CONFIG}).")
    if depth >= MAX_DEPTH:
        raise ValueError(f"{path}: baselines are nested deeper than {MAX_DEPTH} levels.")
    kind, options, names, files = _read(path)
    folders = {name: find_folder(path, name) for name in names}
    children = {name: _load(llm, f, overrides, seen=seen, depth=depth + 1) for name, f in folders.items()}
    tensors = {}
    if TENSORS in files.entries:
        tensors = read_tensors(path, TENSORS, budget=budget)
    try:
        baseline = KINDS[kind](options, tensors, children)
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {type(error).__name__} {error}.") from error
    files.check(path, budget=budget)
    return baseline


def _read(folder: Path) -> tuple[str, dict[str, Any], list[str], Manifest]:
    file = folder / CONFIG
    raw = read_file(folder, CONFIG, limit=MAX_BYTES)
    try:
        content = json_reader.loads(raw)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error}).") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: this version of scalabl_pyro reads format_version {FORMAT_VERSION}. Load it with the version "
            "that saved it."
        )
    kind, options, names = (content.get(key) for key in ("kind", "options", "children"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{file}: kind={kind!r} is unknown. {nearest(str(kind), KINDS)}")
    if not isinstance(options, dict) or not isinstance(names, list) or not all(map(_is_folder_name, names)):
        raise ValueError(f"{file} is damaged: 'options' must be an object and 'children' a list of folder names.")
    if not isinstance(options.get("provenance", {}), dict):
        raise ValueError(f"{file} is damaged: 'provenance' must be an object.")
    if len(set(names)) < len(names):
        raise ValueError(f"{file} is damaged: 'children' names a folder twice.")
    try:
        files = Manifest.from_json(content.get("files"), names=[TENSORS])
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return kind, options, names, files


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii() and len(name) <= MAX_NAME
