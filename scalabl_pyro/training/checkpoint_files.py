"""Checkpoints of a run as folders. A damaged folder is ignored; pickle is neither written nor read.

    step-00000300/
        tensors.safetensors   parameters, optimizer state, random states, history
        record.json           numbers and strings: the step, and the options of the run
        manifest.json         size and SHA-256 of the other two files, written last

A checkpoint is written under a temporary name, synced to the disk and then renamed (``storage.directories``). If
writing stops in between, the earlier checkpoints are unchanged.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..storage import json_reader
from ..storage.budget import Budget
from ..storage.directories import staged, write_file
from ..storage.manifest import Manifest
from ..storage.tensor_files import read_tensors, write_tensors
from ..storage.unfinished import discard, remove_left_behind
from ..storage.untrusted_files import read_file

logger = logging.getLogger(__name__)

#: Format 2 has the option names of release 0.2 (``lr_A``, ...) and tensors named ``optimizer.*``.
FORMAT_VERSION = 2
TENSORS, RECORD, MANIFEST = "tensors.safetensors", "record.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
#: Largest allowed size of the JSON files, in bytes. The record describes the base model, as a saved posterior does.
MAX_BYTES = {MANIFEST: 2**16, RECORD: 2**24}
#: Largest allowed size of the tensor file where the run does not give a limit, in bytes.
MAX_TENSORS = 2**30


class Checkpoint(NamedTuple):
    """A checkpoint that was read from disk.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of training steps taken.
        tensors: Tensors by name.
        record: Numbers and strings beside the tensors.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]


class CheckpointFolder:
    """The folder of all checkpoints of one run.

    Args:
        path: Folder, created when the first checkpoint is written.
        keep: Number of most recent checkpoints to keep.

    Example:
        >>> import tempfile, torch
        >>> folder = CheckpointFolder(tempfile.mkdtemp(), keep=2)
        >>> folder.write(100, {"loc": torch.zeros(3)}, {"loss": 0.5})
        >>> folder.newest().step
        100
    """

    def __init__(self, path: str | Path, *, keep: int) -> None:
        self.path = Path(path).resolve()  # the working directory may change during a run
        self.keep = keep

    def paths(self) -> list[Path]:
        """Return the folders of all checkpoints, damaged ones too, in the order of their steps."""
        if not self.path.is_dir():
            return []
        return sorted((p for p in self.path.iterdir() if NAME.fullmatch(p.name)), key=_step)

    def write(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, then delete all but the most recent ``keep`` checkpoints.

        Args:
            step: Number of training steps taken.
            tensors: Tensors by name.
            record: Numbers and strings, as JSON can hold them.

        Raises:
            OSError: Writing failed, or something else has the name. The earlier checkpoints are unchanged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step-{step:08d}"
        if os.path.lexists(path) and not _is_ours(path):
            raise FileExistsError(f"{path} is not a checkpoint: rename it, or give another checkpoint_dir.")
        with staged(path) as staging:
            write_tensors(staging / TENSORS, tensors, finite=False)  # the history may hold NaN
            write_file(staging / RECORD, _json(record))
            files = Manifest.of_folder(staging).to_json()
            manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
            write_file(staging / MANIFEST, _json(manifest))
        self._prune()

    def newest(self, *, limit: int = MAX_TENSORS) -> Checkpoint | None:
        """Return the newest usable checkpoint, or None. Each damaged checkpoint that is skipped is logged.

        Args:
            limit: Largest size of a tensor file that the run can have written, in bytes.

        Raises:
            ValueError: The newest checkpoint has another format version.
        """
        for path in reversed(self.paths()):
            try:
                return read(path, limit=limit)
            except (OSError, Damaged) as error:
                logger.warning("The checkpoint %s cannot be used; the one before it is tried next: %s", path, error)
        return None

    def set_aside(self, above: int) -> None:
        """Rename the checkpoints after a step, which could not be used, and delete unfinished and surplus ones.

        Args:
            above: Step that the run resumes from; -1 renames all checkpoints.
        """
        if not self.path.is_dir():
            return
        with suppress(OSError):
            remove_left_behind(self.path)
            for path in self.paths():
                if _step(path) > above:
                    os.replace(path, path.with_name(f"damaged-{path.name}-{os.urandom(2).hex()}"))
        self._prune()  # a run that was killed before it deleted its oldest checkpoint left one too many

    def _prune(self) -> None:
        for path in [path for path in self.paths() if _is_ours(path)][: -self.keep]:
            _delete(path)


class Damaged(ValueError):
    """Raised for a checkpoint whose files do not match its manifest."""


def read(path: Path, *, limit: int = MAX_TENSORS) -> Checkpoint:
    """Read one checkpoint, and compare its files with its manifest.

    Args:
        path: Folder of the checkpoint.
        limit: Largest allowed size of the tensor file, in bytes. It is compared before the file is read.

    Raises:
        Damaged: A file is missing, damaged or changed.
        ValueError: The checkpoint has another format version.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint {path} has format_version {manifest.get('format_version')!r}; this version of "
            f"scalabl_pyro reads {FORMAT_VERSION}. Resume with the version that wrote it, or give another "
            "checkpoint_dir."
        )
    if manifest.get("step") != _step(path):
        raise Damaged(f"{MANIFEST} is that of step {manifest.get('step')!r}.")
    try:
        files = Manifest.from_json(manifest.get("files"), names=[TENSORS, RECORD])
        if len(files.entries) < 2:
            raise Damaged(f"{MANIFEST} must list {TENSORS} and {RECORD}.")
        # Each file is read once to hash it, and once more.
        budget = Budget(bytes=2 * (limit + sum(MAX_BYTES.values())), numbers=limit, files=2)
        files.check(path, budget=budget)
        tensors = read_tensors(path, TENSORS, limit=limit, budget=budget, finite=False)  # the history may hold NaN
    except (FileNotFoundError, ValueError) as error:
        raise Damaged(str(error)) from None
    return Checkpoint(path, _step(path), tensors, _read_json(path / RECORD))


def _is_ours(path: Path) -> bool:
    """Whether a folder holds what a checkpoint holds and nothing else; it may be damaged."""
    return path.is_dir() and not path.is_symlink() and {f.name for f in path.iterdir()} <= {TENSORS, RECORD, MANIFEST}


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json_reader.loads(read_file(file.parent, file.name, limit=MAX_BYTES[file.name]))
    except FileNotFoundError as error:
        raise Damaged(str(error)) from None
    except ValueError as error:  # too large, outside the folder, not text, or not JSON within the limits
        raise Damaged(f"{file.name} cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise Damaged(f"{file.name} is not a JSON object.")
    return value


def _delete(path: Path) -> None:
    """Delete a checkpoint."""
    try:
        discard(path)
    except OSError as error:
        logger.warning("The old checkpoint %s could not be deleted: %s", path, error)
