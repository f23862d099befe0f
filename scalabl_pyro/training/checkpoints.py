"""Checkpoints of a run: when they are written, and what a run may resume from."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._errors import ScalaBLWarning
from .._version import __version__
from ..data.training_batches import Cycle
from ..distributed.processes import Processes
from ..lora.fingerprint import check_fingerprint
from .checkpoint_files import Checkpoint, CheckpointFolder
from .loop import COLUMNS, Trainer
from .run_identity import differences
from .training_state import check_record

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one call of ``fit``; without a folder nothing is written or read.

    Args:
        path: folder, or None.
        every: steps between two.
        keep: so many are kept.
        resume: ``"auto"`` goes on from the newest whole one if there is one, True demands one, False demands that there
            is none.
        processes: that train together. The first one reads and writes, and tells the others what it read: they need
            not see the folder.

    Raises:
        ValueError: options that make no sense.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        every: int,
        keep: int,
        resume: bool | str,
        processes: Processes | None = None,
    ) -> None:
        if resume not in ("auto", True, False):
            raise ValueError(f"resume={resume!r}: expected 'auto', True or False.")
        for name, number in {"checkpoint_every": every, "keep_checkpoints": keep}.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}={number!r} must be a positive whole number.")
        if path is None and resume is True:
            raise ValueError("resume=True needs checkpoint_dir=, the directory to resume from.")
        self.folder = None if path is None else CheckpointFolder(path, keep=keep)
        self.every = every
        self.resume = resume
        self.processes = processes or Processes()
        self.run: dict[str, Any] = {}
        self._trainer: Trainer | None = None
        self._saved_step: int | None = None
        self._tried_step: int | None = None
        self._failure: OSError | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is a folder."""
        return self.folder is not None

    def begin(self, trainer: Trainer, run: Callable[[], dict[str, Any]]) -> None:
        """Bring a trainer to where the run was, or save its start.

        The start is saved so that a folder that cannot be written to is found out before hours of training.

        Args:
            trainer: at its start, in the random scope of the run.
            run: gives what the run is, see :func:`~scalabl_pyro.training.run_identity.describe_run`.

        Raises:
            FileNotFoundError: ``resume=True`` and nothing to resume from.
            FileExistsError: ``resume=False``, and checkpoints are there.
            ValueError: the checkpoint belongs to another run; the message says what differs.
            OSError: the folder cannot be written to.
        """
        if self.folder is None:
            return
        if isinstance(trainer.batches, Cycle):
            trainer.batches.keeps_digest = True
        self._trainer, self.run = trainer, run()
        trainer.save, trainer.save_every = self.save_together, self.every
        folder, together = self.folder, self.processes
        found = together.from_rank_zero(lambda: self._choose(folder))
        if found is None:
            together.from_rank_zero(lambda: folder.set_aside(-1))
            together.from_rank_zero(self._write)
            return
        self._check(found)
        try:
            state = check_record(found.record.get("state"), COLUMNS, step=found.step, num_steps=self.run["num_steps"])
            trainer.load_state(found.tensors, state)
        except ValueError as error:
            raise ValueError(f"{found.path} cannot be resumed from: {error}") from error
        together.broadcast_random_state(trainer.execute.device)
        together.from_rank_zero(lambda: folder.set_aside(found.step))
        self._saved_step = self._tried_step = found.step
        logger.info("resumed from %s, %d of %s steps", found.path, found.step, self.run["num_steps"])

    def save_together(self) -> None:
        """Save the present step, which all processes have reached: the first one writes, the others wait."""
        self.processes.from_rank_zero(self.save)

    def save(self) -> None:
        """Save the present step; on failure the training goes on, and the last checkpoint stays."""
        if self.folder is None or self._trainer is None or self._trainer.next_step == self._tried_step:
            return
        if not self.processes.is_first:
            return
        if names := self._trainer.overflown():
            self._tried_step = self._trainer.next_step
            logger.error("step %d is not saved: %s is not finite", self._trainer.next_step, names[0])
            return
        try:
            self._write()
        except OSError as error:
            self._failure, self._tried_step = error, self._trainer.next_step
            logger.error("the checkpoint of step %d could not be written: %s", self._trainer.next_step, error)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Save the last step when the training inside the context ends, well or by an exception between two steps."""
        try:
            yield
        except FloatingPointError:  # the last checkpoint leads to the same step with the same noise
            raise
        except BaseException:
            if self._trainer is not None and self._trainer.is_whole:
                list(self._trainer.read())
                self.save()
            raise
        if self.is_on:
            self.save_together()
        if self._failure is not None:
            warnings.warn(
                f"The last checkpoint is that of step {self._saved_step}, later ones could not be written: "
                f"{self._failure}. Save the posterior elsewhere.",
                ScalaBLWarning,
                stacklevel=4,
            )

    def _write(self) -> None:
        assert self.folder is not None and self._trainer is not None
        tensors, state = self._trainer.state()
        versions = {"scalabl_pyro": __version__, "torch": torch.__version__}
        self.folder.write(self._trainer.next_step, tensors, {"run": self.run, "versions": versions, "state": state})
        self._saved_step = self._tried_step = self._trainer.next_step
        self._failure = None

    def _choose(self, folder: CheckpointFolder) -> Checkpoint | None:
        if self.resume is False:
            if there := [path.name for path in folder.paths()]:
                raise FileExistsError(
                    f"resume=False, but {folder.path} holds checkpoints ({', '.join(there)}): give another "
                    "checkpoint_dir, delete them, or resume."
                )
            return None
        found = folder.newest()
        if found is None and self.resume is True:
            raise FileNotFoundError(f"resume=True, but {folder.path} holds no whole checkpoint.")
        return found

    def _check(self, found: Checkpoint) -> None:
        """Refuse a checkpoint of another run."""
        there = f"{found.path} belongs to another run"
        saved = found.record.get("run")
        if not isinstance(saved, dict) or not isinstance(saved.get("base_model"), dict):
            raise ValueError(f"{there}: its record does not say which.")
        if differing := differences(saved, self.run):
            raise ValueError(
                f"{there}: {'; '.join(differing)}. Use the same options, or another checkpoint_dir for another run."
            )
        try:
            check_fingerprint(saved["base_model"], self.run["base_model"])
        except ValueError as error:
            raise ValueError(f"{there}. {error}") from None
        before = found.record.get("versions")
        if not isinstance(before, dict) or before.get("torch") != torch.__version__:
            logger.warning(
                "%s was written under %s, this is torch %s: bits may differ", found.path, before, torch.__version__
            )
