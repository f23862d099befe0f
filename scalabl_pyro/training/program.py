"""Builds what a training needs from the arguments of ``fit``: data, guide, objective, step and trainer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .._process.random_state import Stream, derive_seed
from .._process.stop_signals import StopSignals
from ..data.batch import Batch
from ..data.training_batches import TrainingBatches, training_source
from ..distributed.processes import Processes
from ..guides import Guide, GuideLike, ParticleGuide, as_guide
from ..lora.base_module import check_has_values
from ..lora.hidden_state_cache import PrefixStore
from ..lora.position_table import position_limit
from ..model.bayesian_lora import BayesianLoRA
from ..model.joint import TaskModel
from ..tasks import Task
from .checkpoints import Checkpoints
from .cuda_graphs import GRAPH_TOKENS, GraphedStep, uses_graph
from .fresh_start import Start, choose_start
from .gradient_check import GradientCheck
from .loop import Trainer
from .objective import Objective, ScopedGuide, TrainingObjective, allows_row_draws, elbo_for, weight_at
from .optimizer import build_optimizer, parameters_of, rate_schedule
from .options import TrainingOptions
from .provenance import as_json, describe_data, describe_options, versions
from .run_identity import describe_run
from .score_function import LeaveOneOutELBO
from .shared_batches import check_shareable
from .start_check import check_finite
from .step import EagerStep
from .svgd import SteinObjective
from .update_check import UpdateCheck, logarithms_of

#: Number of steps after which the host reads the losses of a GPU, because it has to wait for each reading.
READ_EVERY = 10


@dataclass(frozen=True)
class TrainingProgram:
    """What is trained on what.

    Attributes:
        model: The joint model of latents and answers.
        guide: The guide.
        objective: What is minimized.
        elbo: Class name of the estimator.
        batches: Gives the batch of a step.
        store: Cache of hidden states, or None.
        options: The options of the run.
        processes: Processes that train together.
        moved: What was trained before, in words; the training goes on from it.
    """

    model: TaskModel
    guide: Guide
    objective: TrainingObjective
    elbo: str
    batches: Callable[[int], Batch]
    store: PrefixStore | None
    options: TrainingOptions
    processes: Processes
    moved: Sequence[str] = ()

    @property
    def device(self) -> torch.device:
        """Device of the first adapted layer."""
        return self.model.blora.device

    def identity(self) -> dict[str, Any]:
        """Identity of the run, for checkpoints."""
        return describe_run(self.model, self.guide, self.batches, self.options.identity())

    def identity_of_processes(self, checkpoint_every: int | None) -> dict[str, Any]:
        """Identity of the run, and all else that must be equal in processes that train together."""
        hardware = {"micro_batch_size": self.options.hardware.micro_batch_size, "device": self.device.type}
        rest = {"on_nonfinite": self.options.on_nonfinite, "checkpoint_every": checkpoint_every}
        return describe_run(self.model, self.guide, self.batches, self.options.identity() | hardware | rest)

    def provenance(self, history: list[dict[str, float]], seconds: float, start: Start) -> dict[str, Any]:
        """What a posterior stores about its training, see :mod:`scalabl_pyro.training.provenance`."""
        options = self.options
        record = {
            "num_data": self.model.num_data,
            "num_steps": len(history),
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
            "draws": self.model.draws,
            "method": self.guide.method,
            "elbo": self.elbo,
            "seconds": round(seconds, 3),
            "start": start,
            "options": describe_options(options, history),
            "rates": {
                **{"A": options.lr_A, "B": options.lr, "heads": options.lr_A, "task": options.lr},
                **{"loc": options.lr_loc, "scale": options.optimizer.lr_scale},
            },
            "data": describe_data(self.batches, self.model.num_data),
            "versions": versions(),
        }
        return as_json(record)


def build_program(
    blora: BayesianLoRA,
    task: Task,
    train_data: Any,
    *,
    guide: GuideLike,
    num_data: int | None,
    options: TrainingOptions,
    processes: Processes,
    keeps_digest: bool,
    reset: bool = False,
) -> TrainingProgram:
    """Read the data, build the guide, and choose the objective.

    Args:
        blora: The LLM.
        task: The likelihood.
        train_data: Rows, or batches.
        guide: Posterior family.
        num_data: N, or None to count the rows.
        options: The options of the run.
        processes: Processes that train together.
        keeps_digest: Whether the run writes checkpoints, which need a digest of the batches.
        reset: Whether to undo earlier trainings of the LLM, its prior and the task first.

    Raises:
        ValueError: Data, guide, prior, ELBO or processes do not fit together.
    """
    hardware = options.hardware
    check_has_values(blora.llm)
    check_shareable(processes, blora, batch_size=options.batch_size, cache_prefix=hardware.cache_prefix)
    blora.move_own_tensors()  # not the LLM, which may lie on several devices
    task.to(blora.device)
    batches, num_data = training_source(
        train_data,
        task.encode,
        batch_size=options.batch_size,
        pad_token_id=task.pad_token_id,
        num_data=num_data,
        seed=options.seed,
        multiple=_width_multiple(blora) if hardware.cuda_graph else 1,
        keeps_digest=keeps_digest,
    )
    if isinstance(batches, TrainingBatches):
        task.check_llm(blora.adapter, batches.examples)
    moved = choose_start(blora, task, reset=reset)  # after the data were read: bad rows change nothing
    if reset:
        task.restart()
    check_finite(point_estimates=blora.point_estimates, prior=blora.prior, task=task)
    task.prepare_for(batches)
    store = _prefix_store(blora, batches, num_data) if hardware.cache_prefix else None
    scale_seed = derive_seed(options.seed, "initial scales")
    family = as_guide(guide, blora, init_scale=options.init_scale, seed=scale_seed).to(blora.device)
    check_finite(guide=family)
    elbo = elbo_for(options.elbo, family, blora.prior)
    if processes.are_several and (not allows_row_draws(elbo) or isinstance(elbo, LeaveOneOutELBO)):
        raise ValueError(
            f"{type(elbo).__name__} is not a sum over rows, so {processes.size} processes cannot share a batch: use "
            "Trace_ELBO, or train in one process."
        )
    draws = options.draws if family.per_example and allows_row_draws(elbo) else "shared"
    model = TaskModel(blora, task, num_data=num_data, draws=draws, factor_scale=options.optimizer.factor_scale)
    objective: TrainingObjective
    if family.method == "SVGD":
        objective = SteinObjective(model, cast(ParticleGuide, family))
    else:
        objective = Objective(elbo, model, ScopedGuide(family, draws=draws))
    return TrainingProgram(model, family, objective, type(elbo).__name__, batches, store, options, processes, moved)


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
    graphed = uses_graph(
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
        capturable=graphed,
    )
    step = (GraphedStep if graphed else EagerStep)(
        program.objective,
        optimizer,
        device=program.device,
        micro_batch_size=hardware.micro_batch_size,
        max_grad_norm=optimizer_options.max_grad_norm,
        store=program.store,
        processes=program.processes,
        signals=signals,
        check=GradientCheck(program.model.blora),
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
    )


def _trained_logarithms(program: TrainingProgram) -> list[Tensor]:
    found = [*logarithms_of(program.guide), *logarithms_of(program.model)]
    return list({id(p): p for p in found if p.requires_grad}.values())


def _width_multiple(blora: BayesianLoRA) -> int:
    """Return the number to whose multiples widths are padded for captured steps, so that they end within the model."""
    if blora.device.type != "cuda":
        return 1
    return math.gcd(GRAPH_TOKENS, position_limit(blora.llm) or 0)


def _prefix_store(blora: BayesianLoRA, batches: Callable[[int], Batch], num_data: int) -> PrefixStore:
    if not blora.adapter.has_fixed_prefix:
        raise ValueError(
            "cache_prefix=True: no fixed blocks lie below the first adapted one. Adapt only the upper blocks, with "
            "bayesian_lora(..., layers_to_transform=range(16, 32)) of a causal LM, or leave cache_prefix out."
        )
    if not isinstance(batches, TrainingBatches):
        raise ValueError("cache_prefix=True must recognize each row: pass rows as train_data, not batches.")
    return PrefixStore(blora.adapter, num_data)
