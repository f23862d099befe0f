"""A fitted posterior as the bytes of its files, so that a fitted estimator can be copied to another process."""

import tempfile
from pathlib import Path

from torch import nn

from ...posterior.posterior import Posterior


class SavedFiles(dict[str, bytes]):
    """Files that ``posterior.save_pretrained`` writes, by their relative path."""


def to_files(posterior: Posterior) -> SavedFiles:
    """Read the files of a posterior into memory."""
    with tempfile.TemporaryDirectory() as folder:
        posterior.save_pretrained(Path(folder) / "posterior")
        root = Path(folder) / "posterior"
        return SavedFiles(
            {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        )


def from_files(files: SavedFiles, base: nn.Module) -> Posterior:
    """Load a posterior from the files of :func:`to_files`, on its base model."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return Posterior.from_pretrained(base, folder)
