"""Runs a training to its end, shows its progress, and freezes what was learned."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pandas as pd

from ..posterior.posterior import Posterior
from .alike import check_alike
from .checkpoints import Checkpoints
from .history import KEPT
from .loop import Trainer
from .messages import explained
from .outcome import MIN_STEPS, ended_worse, predicts_one_class
from .program import TrainingProgram
from .progress import Progress
from .result import FitResult, TrainingError, freeze
from .settled import settled

logger = logging.getLogger(__name__)


def train(
    trainer: Trainer,
    checkpoints: Checkpoints,
    *,
    num_steps: int,
    stop: Callable[[dict[str, float]], bool] | None,
    progress: bool,
) -> tuple[TrainingError | None, bool]:
    """Take all steps.

    Args:
        trainer: Takes the steps.
        checkpoints: Checkpoints of the run.
        num_steps: Number of steps of the run.
        stop: Calls the callbacks with a history row, and says whether to stop.
        progress: Whether to show a progress bar.

    Returns:
        Why training ended early, or None; and whether Ctrl-C ended it.
    """
    is_interrupted = False
    is_shown = progress and trainer.execute.processes.is_first
    with Progress(num_steps, first_step=trainer.next_step, is_on=is_shown) as shown:
        try:
            with explained(lambda: trainer.next_step), checkpoints.ending(trainer):
                for row in trainer.run(range(trainer.next_step, num_steps)):
                    shown.show(row)
                    if stop is not None and stop(row):
                        logger.info("a callback stopped the training at step %d", row["step"])
                        break
        except FloatingPointError as failure:
            return TrainingError(str(failure)), False
        except KeyboardInterrupt as interrupt:
            if trainer.execute.processes.are_several and not trainer.signals.delivered:
                interrupt.add_note(
                    "fit() was interrupted in this process alone, in the middle of its work. The other processes end "
                    "with LostProcess. One Ctrl-C ends all processes after the running step, with what was learned."
                )
                raise
            is_interrupted = True
            list(trainer.read())
            logger.warning(
                "interrupted after %d of %d steps; the posterior is what was learned so far",
                len(trainer.history),
                num_steps,
            )
    if names := trainer.overflown():  # a later step would have been rejected
        more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
        error = TrainingError(
            f"At step {trainer.next_step - 1}: the update was too large: {names[0]}{more} not finite any more. Lower "
            "the learning rates."
        )
        return error, is_interrupted
    return None, is_interrupted


def make_result(
    program: TrainingProgram, trainer: Trainer, error: TrainingError | None, *, is_interrupted: bool
) -> FitResult:
    """Freeze what was learned.

    Raises:
        TrainingError: ``error``, with what was learned before it.
    """
    if error is None:
        check_alike(program.processes, trainer.learned)
    history = program.processes.from_rank_zero(lambda: trainer.history)  # the seconds of one clock
    kept, evaluation = _keep_best(trainer, history)
    program.processes.broadcast(list(trainer.learned.tensors().values()))
    why_eager = trainer.execute.why_eager
    provenance = program.provenance(history, trainer.seconds, trainer.start, evaluation, why_eager=why_eager)

    def result() -> FitResult:
        posterior = freeze(program.model.blora, program.model.task, program.guide, provenance)
        until = [row for row in history if kept is None or row["step"] <= kept]
        rows_per_pass = program.options.hardware.micro_batch_size
        warnings = () if error else _look_back(posterior, trainer, until, rows_per_pass)
        frame = pd.DataFrame(history)
        if evaluation is not None and history:
            frame[KEPT] = frame["step"] == kept
        options = program.options
        line = settled(frame, num_steps=options.num_steps, patience=options.patience)
        logger.info("%s", line)
        return FitResult(posterior, frame, warnings, line, is_interrupted)

    if error is not None:
        with suppress(ValueError):  # the parameters may not make a posterior
            error.result = result() if history else None
        raise error
    return result()


def _keep_best(trainer: Trainer, history: list[dict[str, float]]) -> tuple[int | None, dict[str, Any] | None]:
    """Put the best state back, if evaluations chose one. Return its step, and what to store about the evaluations."""
    held_out = trainer.held_out
    if held_out is None:
        return None, None
    held_out.restore(trainer.learned)
    step, _ = held_out.kept(history)
    if held_out.is_over:
        logger.info(
            "stopped after %d of %d steps: the held-out NLL was not lower in %d evaluations; the posterior is that "
            "of step %s",
            trainer.next_step,
            held_out.num_steps,
            held_out.patience,
            step,
        )
    return step, held_out.describe(history)


def _look_back(
    posterior: Posterior, trainer: Trainer, history: list[dict[str, float]], rows_per_pass: int | None
) -> tuple[str, ...]:
    """Say and log what is wrong with the end of a training."""
    found = [ended_worse(history)]
    if len(history) >= MIN_STEPS:
        found.append(predicts_one_class(posterior, list(trainer.recent), rows_per_pass=rows_per_pass))
    warnings = tuple(text for text in found if text is not None)
    for text in warnings:
        logger.warning("%s", text)
    return warnings
