"""Checkpoints of a run as folders that are complete or ignored. No pickle is written or read.

    step-00000300/
        tensors.safetensors   parameters, optimizer state, random states, history
        record.json           numbers and words: the step, and the identity of the run
        manifest.json         size and SHA-256 of the two, written last

A checkpoint is written under a temporary name, flushed to the disk and renamed (``storage.directories``). If the
writing is interrupted, earlier checkpoints stay as they were.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..storage import json_reader
from ..storage.directories import staged, write_file
from ..storage.tensor_files import read_tensors, write_tensors
from ..storage.untrusted_files import check_file, describe, read_file

logger = logging.getLogger(__name__)

#: 2: options have the names of release 0.2 (``lr_A``, ...), tensors those of ``optimizer``.
FORMAT_VERSION = 2
TENSORS, RECORD, MANIFEST = "tensors.safetensors", "record.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
#: Larger ones are no manifest or record that was written here.
MAX_BYTES = {MANIFEST: 2**16, RECORD: 2**26}
MAX_TENSORS = 2**40


class Checkpoint(NamedTuple):
    """What was saved at a step.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of steps taken.
        tensors: Saved tensors by name.
        record: Saved numbers and words.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: Folder, created with the first checkpoint.
        keep: Number of most recent checkpoints to keep.
    """

    def __init__(self, path: str | Path, *, keep: int) -> None:
        self.path = Path(path).resolve()  # the working directory may change during a run
        self.keep = keep

    def paths(self) -> list[Path]:
        """List the folders of all checkpoints, complete or damaged, by step."""
        if not self.path.is_dir():
            return []
        return sorted((p for p in self.path.iterdir() if NAME.fullmatch(p.name)), key=_step)

    def write(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Save a step, then delete all but the last ``keep`` checkpoints.

        Raises:
            OSError: The checkpoint could not be written. Earlier ones stay as they were.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with staged(self.path / f"step-{step:08d}") as staging:
            write_tensors(staging / TENSORS, tensors)
            write_file(staging / RECORD, _json(record))
            files = {name: describe(staging / name) for name in (TENSORS, RECORD)}
            manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
            write_file(staging / MANIFEST, _json(manifest))
        self._prune()

    def newest(self) -> Checkpoint | None:
        """Read the newest valid checkpoint. Damaged ones are skipped with a warning.

        Returns:
            The checkpoint, or None if there is none.

        Raises:
            ValueError: The checkpoint was written in another version of the format.
        """
        for path in reversed(self.paths()):
            try:
                return read(path)
            except (OSError, Damaged) as error:
                logger.warning("the checkpoint %s is damaged and is skipped: %s", path, error)
        return None

    def set_aside(self, above: int) -> None:
        """Rename damaged checkpoints above a step, and delete unfinished ones.

        Args:
            above: Step of the checkpoint that the run resumes from, or -1.
        """
        if not self.path.is_dir():
            return
        with suppress(OSError):
            for path in self.path.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)
            for path in self.paths():
                if _step(path) > above:
                    os.replace(path, path.with_name(f"damaged-{path.name}-{os.urandom(2).hex()}"))
        self._prune()  # a run that was killed after writing may have left one too many

    def _prune(self) -> None:
        for path in self.paths()[: -self.keep]:
            _delete(path)


class Damaged(ValueError):
    """A checkpoint that differs from its manifest."""


def read(path: Path) -> Checkpoint:
    """Read one checkpoint, after checking sizes and sums.

    Raises:
        Damaged: it is not whole.
        ValueError: another version of the format.
    """
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint {path} has format_version {manifest.get('format_version')!r}; this version of "
            f"scalabl_pyro reads {FORMAT_VERSION}. Resume with the version that wrote it, or give another "
            "checkpoint_dir."
        )
    files = manifest.get("files")
    if manifest.get("step") != _step(path) or not isinstance(files, dict) or set(files) != {TENSORS, RECORD}:
        raise Damaged(f"{MANIFEST} does not describe this checkpoint.")
    try:
        for name, said in files.items():
            if not isinstance(said, dict) or set(said) != {"bytes", "sha256"}:
                raise Damaged(f"{MANIFEST} does not describe {name}.")
            check_file(path, name, said)
        tensors = read_tensors(path, TENSORS, limit=MAX_TENSORS, finite=False)  # a history has NaN
    except (FileNotFoundError, ValueError) as error:
        raise Damaged(str(error)) from None
    return Checkpoint(path, _step(path), tensors, _read_json(path / RECORD))


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
    except ValueError as error:  # too large, elsewhere, not JSON, not text, nested or endless
        raise Damaged(f"{file.name} cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise Damaged(f"{file.name} is no JSON object.")
    return value


def _delete(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, because a half-deleted one must not look complete."""
    try:
        gone = path.with_name(f".{path.name}-gone")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be deleted: %s", path, error)
