"""Builds optimizer, step and trainer of a training program."""

from torch import Tensor

from .._process.random_state import Stream, derive_seed
from .._process.stop_signals import StopSignals
from .checkpoints import Checkpoints
from .gradient_check import GradientCheck
from .graph_choice import reason_against
from .graphed_step import GraphedStep
from .held_out import HeldOut
from .loop import Trainer
from .objective import weight_at
from .optimizer import build_optimizer, parameters_of, rate_schedule
from .program import TrainingProgram
from .step import EagerStep
from .update_check import UpdateCheck, logarithms_of

#: Number of steps after which the host reads the losses of a GPU, because it has to wait for each reading.
READ_EVERY = 10


def build_trainer(
    program: TrainingProgram, *, checkpoints: Checkpoints, signals: StopSignals, read_each_step: bool
) -> Trainer:
    """Build the optimizer, the step and the trainer of a program.

    Args:
        program: What is trained on what.
        checkpoints: Checkpoints of the run.
        signals: Signals that this process receives.
        read_each_step: Whether somebody waits for the history row of each step.

    Raises:
        ValueError: ``cuda_graph=True``, but the step cannot be captured.
    """
    options, optimizer_options, hardware = program.options, program.options.optimizer, program.options.hardware
    why_eager = reason_against(
        hardware.cuda_graph,
        program.objective,
        keeps_prefix=program.store is not None,
        are_several=program.processes.are_several,
    )
    optimizer = build_optimizer(
        program.model,
        program.guide,
        lr=options.lr,
        lr_A=options.lr_A,
        lr_loc=options.lr_loc,
        lr_scale=optimizer_options.lr_scale,
        weight_decay=optimizer_options.weight_decay,
        capturable=why_eager is None,
    )
    step = (EagerStep if why_eager else GraphedStep)(
        program.objective,
        optimizer,
        device=program.device,
        micro_batch_size=hardware.micro_batch_size,
        max_grad_norm=optimizer_options.max_grad_norm,
        store=program.store,
        processes=program.processes,
        signals=signals,
        check=GradientCheck(program.model.blora),
        why_eager=why_eager,
        update_check=UpdateCheck(
            parameters_of(optimizer),
            logarithms=_trained_logarithms(program),
            largest_rate=max(options.lr, options.lr_A, options.lr_loc, optimizer_options.lr_scale),
        ),
    )
    return Trainer(
        step,
        batches=program.batches,
        noise=Stream(derive_seed(options.seed, "noise")),
        kl_weight=lambda step: weight_at(options.kl_weight, step),
        rate=rate_schedule(optimizer_options.schedule, optimizer_options.warmup, options.num_steps),
        lr=options.lr,
        num_data=program.model.num_data,
        start="continued" if program.moved else "fresh",
        read_every=1 if read_each_step or program.device.type == "cpu" else READ_EVERY,
        on_nonfinite=options.on_nonfinite,
        signals=signals,
        save=checkpoints.save_together,
        save_every=checkpoints.every,
        num_tokens=program.model.task.num_tokens if program.model.task.scores_only else None,
        held_out=_held_out(program),
    )


def _held_out(program: TrainingProgram) -> HeldOut | None:
    if program.held_out is None:
        return None
    options = program.options
    return HeldOut(
        program.held_out,
        program.held_out.columns,
        every=options.steps_between_evaluations,
        num_steps=options.num_steps,
        patience=options.patience,
    )


def _trained_logarithms(program: TrainingProgram) -> list[Tensor]:
    found = [*logarithms_of(program.guide), *logarithms_of(program.model)]
    return list({id(p): p for p in found if p.requires_grad}.values())
