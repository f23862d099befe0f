"""Stochastic variational inference: one ELBO, one torch optimizer, four learning rates."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyro.infer import ELBO

from .._arguments import check_role, known_arguments
from .._deprecated import renamed_arguments
from .._errors import check_flag
from .._process.pyro_errors import without_trace_shapes
from .._process.stop_signals import StopSignals
from ..distributed.processes import Processes, collective, current_processes
from ..guides import INIT_SCALE, GuideLike
from ..model.bayesian_lora import BayesianLoRA
from ..tasks import Task
from .build_trainer import build_trainer
from .checkpoints import Checkpoints
from .loop import Callback, Trainer
from .option_groups import (
    GROUPS,
    MOVED_TO_GROUPS,
    CheckpointOptions,
    EvaluationOptions,
    HardwareOptions,
    OptimizerOptions,
    as_groups,
)
from .options import DrawsPerBatch, OnNonfinite, TrainingOptions
from .program import TrainingProgram, build_program
from .result import FitResult
from .run import make_result, train
from .run_identity import begin_alike
from .scope import training_scope
from .start_check import check_start

logger = logging.getLogger(__name__)


@renamed_arguments(GROUPS, A_lr="lr_A", **MOVED_TO_GROUPS)
@known_arguments
@collective
@without_trace_shapes()
def fit(
    blora: BayesianLoRA,
    task: Task,
    train_data: Any,
    *,
    eval_data: Any = None,
    eval_every: int | None = None,
    patience: int | None = None,
    guide: GuideLike = "normal",
    num_steps: int = 1000,
    batch_size: int = 16,
    lr: float = 8e-3,
    lr_A: float = 2.5e-4,
    kl_weight: float | Callable[[int], float] = 1.0,
    elbo: ELBO | None = None,
    draws: DrawsPerBatch = "per_example",
    init_scale: float = INIT_SCALE,
    num_data: int | None = None,
    on_nonfinite: OnNonfinite = "raise",
    evaluation: EvaluationOptions | Mapping[str, Any] | None = None,
    optimizer: OptimizerOptions | Mapping[str, Any] | None = None,
    hardware: HardwareOptions | Mapping[str, Any] | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint: CheckpointOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    reset: bool = False,
) -> FitResult:
    """Learn the posterior of s together with the factors A and B, new heads and the task's own parameters.

    Args:
        blora: The LLM.
        task: The likelihood.
        train_data: Rows for the task (dicts, a ``datasets.Dataset``, the path of a JSONL file), or an iterable of
            :class:`~scalabl_pyro.data.Batch` that can be restarted, such as a DataLoader.
        eval_data: Held-out rows with answers, which are scored while the training runs; no step trains on them. The
            scores stand in the history, see :class:`FitResult`, and do not change the training. Of a hub data set,
            it is the split "validation".
        eval_every: Number of steps between two evaluations; the last step is always evaluated. Default: a tenth of
            ``num_steps``.
        patience: Number of evaluations in a row without a lower held-out NLL after which training stops. With it, the
            posterior holds A, B, guide, heads and task parameters of the evaluation with the lowest NLL, whether
            training stopped early or not. Default: no early stop, and the posterior is that of the last step.
        guide: Family of the approximate posterior q(s), see :func:`scalabl_pyro.guides.as_guide`.
        num_steps: Number of optimizer steps.
        batch_size: Rows per step, of all processes together; see the page *Several GPUs*.
        lr: Learning rate of B and of the task's parameters (AdamW). Tune it first, see the page *Quality*.
        lr_A: Learning rate of A and of new heads. They have as many inputs as the model is wide, so they need smaller
            steps (LoRA+, Hayou et al., 2024). With equal rates of A and B, runs on hard data overfitted, ended at
            chance or diverged.
        kl_weight: Weight of KL(q || p); 1 is the ELBO. A function maps the step to a weight.
        elbo: Any Pyro ELBO. Default: the one with closed-form KLs if guide and prior allow it, else ``Trace_ELBO``.
        draws: ``"per_example"`` (each row has its own s, if the family allows it) or ``"shared"``.
        init_scale: Largest initial standard deviation of the guide. The paper has 0.05.
        num_data: Size N of the training set; needed if ``train_data`` yields batches.
        on_nonfinite: What to do after a loss or gradient that is not finite. ``"raise"`` stops. ``"skip"`` leaves the
            step out, and stops after 10 in a row. ``"restore"`` also returns to the parameters of up to 50 steps ago,
            and stops if it happens again within 50 steps.
        evaluation: Number of draws and rows per pass of the evaluations: :class:`scalabl_pyro.EvaluationOptions`, or a
            dict of them.
        optimizer: Further options of AdamW: :class:`scalabl_pyro.OptimizerOptions`, or a dict of them.
        hardware: Options that trade memory for time: :class:`scalabl_pyro.HardwareOptions`, or a dict of them.
        checkpoint_dir: Directory of the checkpoints of this run, see the page *Resume*. With it, SIGTERM ends
            the training after the running step, with a checkpoint and status 143.
        checkpoint: When to write checkpoints and whether to resume: :class:`scalabl_pyro.CheckpointOptions`, or a dict
            of its options.
        seed: Seed of data order, initial scales and noise, which have independent streams. The global random state
            does not change.
        callbacks: Functions that are called with the history row of each step. If one returns True, training stops.
        progress: Whether to show a progress bar.
        reset: Whether to start afresh if ``blora`` or ``task`` were trained before. Factors, latents and new heads then
            have the values that they had after ``bayesian_lora``. The parameters of prior and task have those from
            before their first training. By default the training goes on from the earlier one; a warning is logged, and
            ``posterior.provenance["start"]`` is ``"continued"``.

    Returns:
        The posterior and the history. Ctrl-C ends the training after the running step (a second one at once) and
        returns what was learned so far. In one of several processes, a second Ctrl-C raises KeyboardInterrupt, and the
        other processes end with LostProcess.

    Raises:
        ValueError: Rows do not fit the task, an option is out of its range, ``num_data`` is missing, or the checkpoint
            belongs to another run, or a parameter is not finite before the first step.
        TypeError: An option has the wrong type, or a dict of options has an unknown key.
        TrainingError: A loss, gradient or parameter is not finite; its ``result`` holds what was learned before.
        RuntimeError: No gradient reaches some layers, which the message names; or a worker of the data loader died.
        LostProcess: Another process of this training is gone.

    Example:
        >>> blora = scalabl_pyro.bayesian_lora(llm)
        >>> result = scalabl_pyro.fit(blora, task, rows, num_steps=100, seed=0)
        >>> result.history["loss"].iloc[-1]
    """
    _check_objects(blora, task, callbacks, progress=progress, reset=reset)
    _check_evaluation(eval_data, eval_every=eval_every, patience=patience, evaluation=evaluation)
    options = TrainingOptions(
        num_steps=num_steps,
        batch_size=batch_size,
        lr=lr,
        lr_A=lr_A,
        kl_weight=kl_weight,
        elbo=elbo,
        draws=draws,
        init_scale=init_scale,
        seed=seed,
        on_nonfinite=on_nonfinite,
        eval_every=eval_every,
        patience=patience,
        **as_groups(optimizer=optimizer, checkpoint=checkpoint, hardware=hardware, evaluation=evaluation),
    )
    checkpoints = Checkpoints(checkpoint_dir, options.checkpoint, processes=current_processes())
    program = build_program(
        blora,
        task,
        train_data,
        eval_data=eval_data,
        guide=guide,
        num_data=num_data,
        options=options,
        processes=checkpoints.processes,
        keeps_digest=checkpoints.is_on,
        reset=reset,
    )
    return _run(program, checkpoints, callbacks, progress=progress)


def _run(
    program: TrainingProgram, checkpoints: Checkpoints, callbacks: Sequence[Callback], *, progress: bool
) -> FitResult:
    """Train, and freeze what was learned."""
    processes, options = program.processes, program.options
    signals = StopSignals(terminate=checkpoints.is_on)
    has_callbacks = any(processes.all_gather(lambda: bool(callbacks)))  # some log in the first process only
    trainer = build_trainer(program, checkpoints=checkpoints, signals=signals, read_each_step=has_callbacks)
    stop = partial(_any_stops, processes, callbacks) if has_callbacks else None
    blora = program.model.blora
    with training_scope(blora, gradient_checkpointing=options.hardware.gradient_checkpointing), signals:
        _begin(program, trainer, checkpoints)
        error, is_interrupted = train(trainer, checkpoints, num_steps=options.num_steps, stop=stop, progress=progress)
    return make_result(program, trainer, error, is_interrupted=is_interrupted)


def _begin(program: TrainingProgram, trainer: Trainer, checkpoints: Checkpoints) -> None:
    """Give all processes the same start, and continue from the newest checkpoint if there is one."""
    if program.processes.are_several:
        begin_alike(program.processes, trainer, program.identity_of_processes(checkpoints.every))
    checkpoints.begin(trainer, program.identity)
    check_start(program.objective, trainer.execute.update_check)
    if program.moved and trainer.next_step == 0:
        logger.warning(
            "an earlier training changed %s, and this one goes on from there; pass reset=True to start afresh",
            " and ".join(program.moved),
        )


def _check_objects(blora: BayesianLoRA, task: Task, callbacks: Sequence[Callback], **switches: bool) -> None:
    call = "fit(blora, task, train_data)"
    check_role("blora", blora, "blora", call=call)
    check_role("task", task, "task", call=call)
    blora.adapter.check_attached()
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks={callbacks!r}: expected a list of functions, such as callbacks=[print].")
    check_flag(**switches)


def _check_evaluation(eval_data: Any, **options: Any) -> None:
    """Refuse options of evaluations without held-out rows, which would do nothing."""
    given = [name for name, value in options.items() if value is not None]
    if eval_data is None and given:
        raise ValueError(
            f"{given[0]}={options[given[0]]!r} needs eval_data=, the held-out rows that are scored while the training "
            "runs. Pass rows with answers that are not in train_data."
        )


def _any_stops(processes: Processes, callbacks: Sequence[Callback], row: dict[str, float]) -> bool:
    """Call all callbacks, and say whether one of them stops the training, in any process."""
    return any(processes.all_gather(lambda: any([callback(row) for callback in callbacks])))
