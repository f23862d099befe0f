"""Stochastic variational inference: one ELBO, one torch optimizer, four learning rates."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pyro.infer import ELBO
from tqdm.auto import tqdm

from .._deprecated import renamed_arguments
from .._errors import check_choice, check_positive
from .._process.stop_signals import StopSignals
from ..data.batch import Batch
from ..data.encoding import check_tokens
from ..data.training_batches import TrainingBatches, training_source
from ..distributed.processes import collective, current_processes
from ..guides import INIT_SCALE, GuideLike, ParticleGuide, as_guide
from ..lora.hidden_state_cache import PrefixStore
from ..model.bayesian_lora import BayesianLoRA
from ..model.joint import TaskModel
from ..tasks import Task
from .checkpoints import Checkpoints
from .cuda_graphs import GRAPH_TOKENS, GraphedStep, uses_graph
from .loop import Callback, Trainer
from .messages import explained
from .objective import Objective, ScopedGuide, allows_row_draws, elbo_for, weight_at
from .optimizer import build_optimizer, rate_schedule
from .result import FitResult, TrainingError, freeze
from .run_identity import OF_A_RUN, begin_alike, describe_run
from .scope import training_scope
from .shared_batches import check_shareable
from .step import EagerStep
from .svgd import SteinObjective

logger = logging.getLogger(__name__)

#: Steps after which a GPU's losses are read: each reading waits for it.
READ_EVERY = 10


@renamed_arguments(A_lr="lr_A", loc_lr="lr_loc", scale_lr="lr_scale")
@collective
def fit(
    blora: BayesianLoRA,
    task: Task,
    train_data: Any,
    *,
    guide: GuideLike = "normal",
    num_steps: int = 1000,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    lr: float = 8e-3,
    lr_A: float = 2.5e-4,
    lr_loc: float | None = None,
    lr_scale: float = 3e-2,
    weight_decay: float = 0.0,
    factor_scale: float | None = None,
    warmup: float = 0.06,
    schedule: str = "linear",
    kl_weight: float | Callable[[int], float] = 1.0,
    elbo: ELBO | None = None,
    draws: str = "per_example",
    init_scale: float = INIT_SCALE,
    max_grad_norm: float | None = None,
    num_data: int | None = None,
    cache_prefix: bool = False,
    cuda_graph: bool | str = "auto",
    gradient_checkpointing: bool = False,
    on_nonfinite: str = "raise",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    keep_checkpoints: int = 2,
    resume: bool | str = "auto",
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> FitResult:
    """Learn the posterior of s together with the factors A, B, new heads and the task's own parameters.

    Args:
        blora: the LLM.
        task: the likelihood.
        train_data: rows for the task (dicts, a ``datasets.Dataset``, the path of a JSONL file), or an iterable of
            :class:`~scalabl_pyro.data.Batch` that can be restarted, such as a DataLoader.
        guide: posterior family, see :func:`scalabl_pyro.guides.as_guide`.
        num_steps: optimizer steps.
        batch_size: rows a step, of all processes together; see the how-to page *Several processes*.
        micro_batch_size: rows a forward pass of a process; smaller ones accumulate gradients of the same ELBO.
        lr: of B and the task's parameters (AdamW). The first thing to tune, see the page *Quality*.
        lr_A: of A and new heads, whose inputs are as many as the model is wide: they need smaller steps (LoRA+, Hayou
            et al., 2024). With an A as fast as B, runs on hard data overfitted, ended at chance or diverged.
        lr_loc: of the guide's locations; default ``lr``.
        lr_scale: of the guide's scales (as logarithms).
        weight_decay: on A and B only, decoupled from the loss: a step shrinks each by its learning rate times this.
        factor_scale: standard deviation of a normal MAP prior on B (and A, where the gauge leaves it free), which
            enters the loss.
        warmup: share of the steps over which learning rates rise from 0.
        schedule: ``"linear"`` decay to 0 after the warm-up, or ``"constant"``.
        kl_weight: weight of KL(q || p); 1 is the ELBO; a callable maps the step to a weight.
        elbo: any Pyro ELBO; default: the analytic-KL one where guide and prior allow, else ``Trace_ELBO``.
        draws: ``"per_example"`` (each row its own s, where the family allows) or ``"shared"``.
        init_scale: largest initial standard deviation of the guide (the paper: 0.05).
        max_grad_norm: clip the global gradient norm.
        num_data: N, size of the training set; needed when ``train_data`` yields batches.
        cache_prefix: run the blocks below the first adapted one once for each row, and keep what they give (tokens x
            width numbers a row, on the device) for all later epochs.
        cuda_graph: replay the whole step as a CUDA graph, captured once for each batch shape (prompts are padded to
            multiples of 16 tokens, so that shapes repeat): a launch a step instead of thousands, and the same losses.
            ``"auto"``: on a GPU, wherever the step allows it; why it does not is logged. True insists.
        gradient_checkpointing: keep the input of each block alone and run blocks again in the backward pass, with the
            same draws: a third more time, far less memory.
        on_nonfinite: what follows a loss or gradient that is not finite: ``"raise"``; ``"skip"`` leaves the step out,
            and raises after 10 in a row; ``"restore"`` also goes back to the parameters of up to 50 steps ago, and
            raises when it happens again within 50 steps.
        checkpoint_dir: directory of this run's checkpoints, see the how-to page *Resume*. With one, SIGTERM ends the
            training after the running step, with a checkpoint and status 143.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: so many are kept, the newest.
        resume: ``"auto"`` goes on from the newest whole checkpoint if there is one, True demands one, False demands an
            empty directory.
        seed: of data order, initial scales and noise; the global random state is left alone.
        callbacks: called with the history row of each step; returning True stops the training.
        progress: show a progress bar.

    Returns:
        The posterior and the history. Ctrl-C ends the training after the running step (a second one at once) and
        returns what was learned so far.

    Raises:
        ValueError: rows that do not fit the task, unknown options, missing ``num_data``, a checkpoint of another run.
        TrainingError: a loss, gradient or parameter that is not finite; its ``result`` holds what was learned before.
        RuntimeError: layers that no gradient reaches, by name; a worker of the data loader that died.
        LostProcess: another process of this training is gone.
    """
    processes = current_processes()
    options = {name: value for name, value in locals().items() if name in OF_A_RUN}
    checkpoints = Checkpoints(
        checkpoint_dir, every=checkpoint_every, keep=keep_checkpoints, resume=resume, processes=processes
    )
    check_choice("draws", draws, ("per_example", "shared"))
    check_choice("schedule", schedule, ("linear", "constant"))
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup} must lie between 0 and 1: it is a share of the steps.")
    check_positive(num_steps=num_steps, batch_size=batch_size, lr=lr, lr_A=lr_A, lr_scale=lr_scale)
    if micro_batch_size is not None:
        check_positive(micro_batch_size=micro_batch_size)
    check_shareable(processes, blora, batch_size=batch_size, cache_prefix=cache_prefix)
    device = blora.device
    blora.move_own_tensors()  # not the LLM, which may lie on several devices
    task.to(device)
    batches, num_data = training_source(
        train_data,
        task.encode,
        batch_size=batch_size,
        pad_token_id=task.pad_token_id,
        num_data=num_data,
        seed=seed,
        multiple=GRAPH_TOKENS if device.type == "cuda" and cuda_graph else 1,
    )
    if isinstance(batches, TrainingBatches):
        check_tokens(batches.examples, blora.llm, task.pad_token_id)
    store = _prefix_store(blora, batches, num_data) if cache_prefix else None
    family = as_guide(guide, blora, init_scale=init_scale, seed=seed).to(device)
    elbo = elbo_for(elbo, family, blora.prior)
    if processes.are_several and not allows_row_draws(elbo):
        raise ValueError(
            f"{type(elbo).__name__} is no sum over rows, so {processes.size} processes cannot share a batch: use "
            "Trace_ELBO, or train in one process."
        )
    if not (family.per_example and allows_row_draws(elbo)):
        draws = "shared"
    model = TaskModel(blora, task, num_data=num_data, draws=draws, factor_scale=factor_scale)
    objective: Objective | SteinObjective
    if isinstance(family, ParticleGuide):
        objective = SteinObjective(model, family)
    else:
        objective = Objective(elbo, model, ScopedGuide(family, draws=draws))
    graphed = uses_graph(cuda_graph, objective, elbo, device, store is not None, processes.are_several)
    optimizer = build_optimizer(
        model,
        family,
        lr=lr,
        lr_A=lr_A,
        lr_loc=lr if lr_loc is None else lr_loc,
        lr_scale=lr_scale,
        weight_decay=weight_decay,
        capturable=graphed,
    )
    signals = StopSignals(terminate=checkpoints.is_on)
    has_callbacks = any(processes.all_gather(lambda: bool(callbacks)))  # some log in the first process only
    trainer = Trainer(
        (GraphedStep if graphed else EagerStep)(
            objective,
            optimizer,
            device=device,
            micro_batch_size=micro_batch_size,
            max_grad_norm=max_grad_norm,
            store=store,
            processes=processes,
        ),
        batches=batches,
        kl_weight=lambda step: weight_at(kl_weight, step),
        rate=rate_schedule(schedule, warmup, num_steps),
        lr=lr,
        num_data=num_data,
        read_every=1 if has_callbacks or device.type == "cpu" else READ_EVERY,
        on_nonfinite=on_nonfinite,
        signals=signals,
    )
    error: TrainingError | None = None
    bar = tqdm(total=num_steps, disable=not progress, desc="fit", unit="step")
    with training_scope(blora, seed, gradient_checkpointing=gradient_checkpointing), signals, bar:
        if processes.are_several:
            also = {
                "micro_batch_size": micro_batch_size,
                "on_nonfinite": on_nonfinite,
                "device": device.type,
                "checkpoint_every": checkpoint_every if checkpoints.is_on else None,
            }
            begin_alike(processes, trainer, describe_run(model, family, batches, options | also))
        checkpoints.begin(trainer, lambda: describe_run(model, family, batches, options))
        bar.update(trainer.next_step)
        try:
            with explained(lambda: trainer.next_step), checkpoints.ending():
                for row in trainer.run(range(trainer.next_step, num_steps)):
                    bar.update(int(row["step"]) + 1 - bar.n)
                    bar.set_postfix({name: f"{row[name]:.4g}" for name in ("loss", "nll", "kl")}, refresh=False)
                    if has_callbacks and any(processes.all_gather(partial(_stops, callbacks, row))):
                        logger.info("a callback stopped the training at step %d", row["step"])
                        break
        except FloatingPointError as failure:
            error = TrainingError(str(failure))
        except KeyboardInterrupt:
            list(trainer.read())
            logger.warning(
                "interrupted after %d of %d steps; the posterior is what was learned so far",
                len(trainer.history),
                num_steps,
            )
        lost = trainer.overflown()
    if lost and error is None:  # a step behind it would have been refused
        error = TrainingError(
            f"At step {trainer.next_step - 1}: the update was too large: {lost[0]}"
            + (f" and {len(lost) - 1} more are" if len(lost) > 1 else " is")
            + " not finite any more. Lower the learning rates."
        )
    history = processes.from_rank_zero(lambda: trainer.history)  # the seconds of one clock
    processes.broadcast(list(trainer.learned.tensors().values()))
    provenance = {
        "num_data": num_data,
        "num_steps": len(history),
        "batch_size": batch_size,
        "seed": seed,
        "draws": draws,
        "method": "SVGD" if isinstance(family, ParticleGuide) else "SVI",
        "elbo": type(elbo).__name__,
        "seconds": round(trainer.seconds, 3),
    }

    def result() -> FitResult:
        return FitResult(freeze(blora, task, family, provenance), pd.DataFrame(history))

    if error is not None:
        with suppress(ValueError):  # of parameters that are no posterior
            error.result = result() if history else None
        raise error
    return result()


def _stops(callbacks: Sequence[Callback], row: dict[str, float]) -> bool:
    return any([callback(row) for callback in callbacks])  # each of them is called


def _prefix_store(blora: BayesianLoRA, batches: Callable[[int], Batch], num_data: int) -> PrefixStore:
    if not blora.adapter.has_fixed_prefix:
        raise ValueError(
            "cache_prefix=True: no fixed blocks lie below the first adapted one. Adapt the upper blocks alone, with "
            "bayesian_lora(..., layers_to_transform=range(16, 32)) of a causal LM, or leave cache_prefix out."
        )
    if not isinstance(batches, TrainingBatches):
        raise ValueError("cache_prefix=True needs rows that can be told apart: pass rows as train_data, not batches.")
    return PrefixStore(blora.adapter, num_data)
