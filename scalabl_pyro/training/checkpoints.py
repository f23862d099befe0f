"""Writes the checkpoints of a run and decides which checkpoint a run may resume from."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._arguments import check_path
from .._errors import ScalaBLWarning, stacklevel_outside
from ..distributed.processes import Processes
from .alike import check_alike
from .checkpoint_files import Checkpoint, CheckpointFolder
from .loop import Trainer
from .option_groups import CheckpointOptions
from .provenance import versions
from .run_identity import check_same_run
from .training_state import check_record

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one call of ``fit``. Without a folder nothing is written or read.

    Args:
        path: Folder, or None.
        options: When to write, how many to keep, and whether to resume.
        processes: Processes that train together. The first one reads and writes, and tells the others what it read:
            they need not see the folder.

    Raises:
        ValueError: ``resume=True`` without a folder, or an empty path.
        TypeError: ``path`` is not a path.
    """

    def __init__(
        self,
        path: str | Path | None,
        options: CheckpointOptions,
        *,
        processes: Processes | None = None,
    ) -> None:
        if path is not None:
            check_path("checkpoint_dir", path)
        if path is None and options.resume is True:
            raise ValueError("resume=True needs checkpoint_dir=, the directory to resume from.")
        self.folder = None if path is None else CheckpointFolder(path, keep=options.keep)
        self.every = None if path is None else options.every
        self.resume = options.resume
        self.processes = processes or Processes()
        self.run: dict[str, Any] = {}
        self._saved_step: int | None = None
        self._tried_step: int | None = None
        self._failure: OSError | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is a folder."""
        return self.folder is not None

    def begin(self, trainer: Trainer, run: Callable[[], dict[str, Any]]) -> None:
        """Load the newest checkpoint of the run into a trainer, or save the start of the run.

        The start is saved so that a folder that cannot be written to is noticed before hours of training.

        Args:
            trainer: The trainer, before its first step.
            run: Gives the identity of the run, see :func:`~scalabl_pyro.training.run_identity.describe_run`.

        Raises:
            FileNotFoundError: ``resume=True``, but the folder has no checkpoint.
            FileExistsError: ``resume=False``, but there are checkpoints.
            ValueError: The checkpoint belongs to another run; the message says what differs.
            OSError: The folder cannot be written to.
        """
        if self.folder is None:
            return
        self.run = run()
        folder, processes = self.folder, self.processes
        found = processes.from_rank_zero(lambda: self._choose(folder, _largest_state(trainer, self.run["num_steps"])))
        if found is None:
            processes.from_rank_zero(lambda: folder.set_aside(-1))
            processes.from_rank_zero(lambda: self._write(folder, trainer))
            return
        self._check(found)
        try:
            state = check_record(
                found.record.get("state"), trainer.columns, step=found.step, num_steps=self.run["num_steps"]
            )
            trainer.load_state(found.tensors, state)
        except ValueError as error:
            raise ValueError(f"{found.path} cannot be resumed from: {error}") from error
        with trainer.noise.use():
            processes.broadcast_random_state(trainer.execute.device)
        processes.from_rank_zero(lambda: folder.set_aside(found.step))
        self._saved_step = self._tried_step = found.step
        logger.info("resumed from %s, %d of %s steps", found.path, found.step, self.run["num_steps"])

    def save_together(self, trainer: Trainer) -> None:
        """Save the present step, which all processes have reached. The first process writes, the others wait.

        Raises:
            ValueError: A process holds other parameters.
        """
        try:
            check_alike(self.processes, trainer.learned)
        except ValueError:
            self._tried_step = trainer.next_step  # nobody knows which parameters are right
            raise
        self.processes.from_rank_zero(lambda: self.save(trainer))

    def save(self, trainer: Trainer) -> None:
        """Save the present step. If that fails, the training continues and the last checkpoint stays."""
        if self.folder is None or not self.processes.is_first or trainer.next_step == self._tried_step:
            return
        if names := trainer.overflown():
            self._tried_step = trainer.next_step
            logger.error("step %d is not saved: %s is not finite", trainer.next_step, names[0])
            return
        try:
            self._write(self.folder, trainer)
        except OSError as error:
            self._failure, self._tried_step = error, trainer.next_step
            logger.error("the checkpoint of step %d could not be written: %s", trainer.next_step, error)

    @contextmanager
    def ending(self, trainer: Trainer) -> Iterator[None]:
        """Save the last step when the context ends, in order or by an exception between two steps."""
        try:
            yield
        except FloatingPointError:  # a resumption would meet the same step with the same noise
            if self.is_on:
                logger.error("step %d is not saved, because it was not finite", trainer.next_step)
            raise
        except BaseException:
            if self.is_on and trainer.is_whole:
                if not self.processes.are_several:  # the others may be gone, and reading may ask them
                    list(trainer.read())
                if not trainer.has_unread:
                    self.save(trainer)
            raise
        if self.is_on:
            self.save_together(trainer)
        if self._failure is not None:
            warnings.warn(
                f"The last checkpoint is that of step {self._saved_step}; later ones could not be written: "
                f"{self._failure}. Save the posterior elsewhere.",
                ScalaBLWarning,
                stacklevel=stacklevel_outside(),
            )

    def _write(self, folder: CheckpointFolder, trainer: Trainer) -> None:
        tensors, state = trainer.state()
        folder.write(trainer.next_step, tensors, {"run": self.run, "versions": versions(), "state": state})
        self._saved_step = self._tried_step = trainer.next_step
        self._failure = None

    def _choose(self, folder: CheckpointFolder, limit: int) -> Checkpoint | None:
        if self.resume is False:
            if names := [path.name for path in folder.paths()]:
                raise FileExistsError(
                    f"resume=False, but {folder.path} holds checkpoints ({', '.join(names)}): give another "
                    "checkpoint_dir, delete them, or resume."
                )
            return None
        found = folder.newest(limit=limit)
        if found is None and self.resume is True:
            raise FileNotFoundError(
                f"resume=True, but {folder.path} holds no valid checkpoint. Give the checkpoint_dir of the earlier "
                "run, or use resume='auto' to start a new run."
            )
        return found

    def _check(self, found: Checkpoint) -> None:
        """Raise ValueError for a checkpoint of another run."""
        advice = "Use the same options, or another checkpoint_dir for another run."
        check_same_run(found.record, self.run, path=found.path, advice=advice)
        before = found.record.get("versions")
        if not isinstance(before, dict) or before.get("torch") != torch.__version__:
            logger.warning(
                "%s was written under %s, this is torch %s: bits may differ", found.path, before, torch.__version__
            )


def _largest_state(trainer: Trainer, num_steps: int) -> int:
    """Largest size of a tensor file that a run can write, in bytes: parameters with moments, and a history."""
    learned = sum(tensor.nbytes for tensor in trainer.learned.tensors().values())
    return 4 * learned + 8 * len(trainer.columns) * num_steps + 2**24
