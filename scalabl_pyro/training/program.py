"""Builds what a training needs from the arguments of ``fit``: data, guide and objective."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from .._process.random_state import derive_seed
from ..data.batch import Batch
from ..data.held_out import HeldOutRows, read_held_out
from ..data.training_batches import TrainingBatches, training_source
from ..distributed.processes import Processes
from ..guides import Guide, GuideLike, ParticleGuide, as_guide
from ..lora.base_module import check_has_values
from ..lora.hidden_state_cache import PrefixStore
from ..lora.position_table import position_limit
from ..model.bayesian_lora import BayesianLoRA
from ..model.joint import TaskModel
from ..tasks import Task
from .cuda_graphs import GRAPH_TOKENS
from .fresh_start import Start, choose_start
from .held_out_scores import HeldOutScores
from .objective import Objective, ScopedGuide, TrainingObjective, allows_row_draws, elbo_for
from .options import TrainingOptions
from .provenance import as_json, describe_capture, describe_data, describe_options, versions
from .run_identity import EVAL_DATA, describe_run
from .score_function import LeaveOneOutELBO
from .shared_batches import check_shareable
from .start_check import check_finite
from .svgd import SteinObjective


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
        held_out: Scores of held-out rows, or None.
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
    held_out: HeldOutScores | None = None

    @property
    def device(self) -> torch.device:
        """Device of the first adapted layer."""
        return self.model.blora.device

    def identity(self) -> dict[str, Any]:
        """Identity of the run, for checkpoints."""
        options = self.options.identity() | self._identity_of_evaluations()
        return describe_run(self.model, self.guide, self.batches, options)

    def identity_of_processes(self, checkpoint_every: int | None) -> dict[str, Any]:
        """Identity of the run, and all else that must be equal in processes that train together."""
        hardware = {"micro_batch_size": self.options.hardware.micro_batch_size, "device": self.device.type}
        rest = {"on_nonfinite": self.options.on_nonfinite, "checkpoint_every": checkpoint_every}
        options = self.options.identity() | self._identity_of_evaluations() | hardware | rest
        return describe_run(self.model, self.guide, self.batches, options)

    def _identity_of_evaluations(self) -> dict[str, Any]:
        """What decides the state that a run keeps. Empty without held-out rows, as in checkpoints of such runs."""
        if self.held_out is None:
            return {}
        options = self.options
        own = {"eval_every": options.steps_between_evaluations, "patience": options.patience}
        return own | {"eval_num_draws": self.held_out.num_draws, EVAL_DATA: self.held_out.rows.digest}

    def provenance(
        self,
        history: list[dict[str, float]],
        seconds: float,
        start: Start,
        evaluation: dict[str, Any] | None,
        *,
        why_eager: str | None,
    ) -> dict[str, Any]:
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
            "cuda_graph": describe_capture(why_eager),
            "options": describe_options(options, history),
            "rates": {
                **{"A": options.lr_A, "B": options.lr, "heads": options.lr_A, "task": options.lr},
                **{"loc": options.lr_loc, "scale": options.optimizer.lr_scale},
            },
            "data": describe_data(self.batches, self.model.num_data),
            "versions": versions(),
        }
        if self.held_out is not None:
            rows = self.held_out.rows
            data = {"num_rows": len(rows.examples), "sha256": rows.digest, "num_draws": self.held_out.num_draws}
            record["evaluation"] = data | (evaluation or {})
        return as_json(record)


def build_program(
    blora: BayesianLoRA,
    task: Task,
    train_data: Any,
    *,
    eval_data: Any = None,
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
        eval_data: Held-out rows, or None.
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
    rows = None if eval_data is None else _read_held_out(eval_data, task, batches)
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
    scores = None
    if rows is not None:
        own: dict[str, Any] = {"seed": options.seed, "processes": processes, "cache_prefix": hardware.cache_prefix}
        scores = HeldOutScores(rows, blora, task, family, options=options.evaluation, **own)
    estimator = type(elbo).__name__
    return TrainingProgram(model, family, objective, estimator, batches, store, options, processes, moved, scores)


def _read_held_out(eval_data: Any, task: Task, batches: Callable[[int], Batch]) -> HeldOutRows:
    train = batches.examples if isinstance(batches, TrainingBatches) else ()
    classes = None if task.scores_only else task.classes
    return read_held_out(eval_data, task.encode, train=train, classes=classes)


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
