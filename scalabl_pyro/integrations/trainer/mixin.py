"""Makes a Trainer maximize the ELBO, evaluate under draws, and save posteriors."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO

from ..._arguments import check_role
from ..._errors import check_count
from ...guides import INIT_SCALE, GuideLike
from ...model.bayesian_lora import BayesianLoRA
from ...posterior.posterior import Posterior
from ...tasks import Completion, Task
from ...training.objective import weight_at
from ...training.options import DrawsPerBatch, TrainingOptions
from ...training.result import snapshot
from ...training.scope import training_scope
from .checkpoint_state import POSTERIOR, read_state, write_state
from .evaluates import EvaluatesUnderDraws
from .evaluation import MetricsUnderDraws
from .inputs import START, EncodedRows, as_batch
from .rates import training_options
from .records import LossTerms, describe_training, run_of
from .refusals import check_arguments, check_training_arguments
from .start import check_llm, start_elbo
from .step_checks import StepChecks

logger = logging.getLogger(__name__)


class ScalaBLMixin(EvaluatesUnderDraws):
    """Makes a Trainer maximize the ELBO: ``class MySFT(ScalaBLMixin, trl.SFTTrainer)``.

    The loss is -ELBO / N in nats per row, where N counts the rows of the training set. One row is one observation.
    Batches of one optimizer step share their noise, so 4 batches of 8 rows make the step of one batch with 32 rows.

    Args:
        blora: The LLM, as :func:`scalabl_pyro.bayesian_lora` returns it.
        task: The likelihood. None means :class:`~scalabl_pyro.Completion` of ``processing_class``: batches then have
            ``input_ids`` and ``labels``, and labels of -100 do not count.
        guide: Family of the approximate posterior, as for :func:`scalabl_pyro.fit`.
        lr: Learning rate of B and of the task's parameters. None means ``args.learning_rate`` if it is not the default
            of TrainingArguments, else the default of ``fit``.
        lr_A: Learning rate of A and of new heads.
        lr_loc: Learning rate of the guide's locations. None means that of B.
        lr_scale: Learning rate of the guide's scales.
        kl_weight: Weight of the KL, or a function from the optimizer step to the weight.
        elbo: A Pyro ELBO, or None for the default one.
        draws: ``"per_example"`` or ``"shared"``.
        init_scale: Largest initial standard deviation of the guide.
        factor_scale: Standard deviation of a prior on the factors, or None.
        num_data: Number N of training rows, needed if ``train_dataset`` has no length.
        num_draws: Number of draws of evaluations and predictions; 0 for the posterior mean.
        trainer_options: Arguments of the Trainer: ``args`` (required), ``train_dataset``, ``callbacks`` and so on.

    Raises:
        TypeError: ``args`` or the task is missing.
        ValueError: An option of the Trainer would be ignored, or has not been tested with an ELBO.

    Example:
        >>> class BayesianSFT(ScalaBLMixin, trl.SFTTrainer):
        ...     pass
        >>> trainer = BayesianSFT(blora, args=trl.SFTConfig("out"), train_dataset=data, processing_class=tokenizer)
    """

    #: The loss of a batch is already its share of the loss of the step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        blora: BayesianLoRA,
        *,
        task: Task | None = None,
        guide: GuideLike = "normal",
        lr: float | None = None,
        lr_A: float = 2.5e-4,
        lr_loc: float | None = None,
        lr_scale: float = 3e-2,
        kl_weight: float | Callable[[int], float] = 1.0,
        elbo: ELBO | None = None,
        draws: DrawsPerBatch = "per_example",
        init_scale: float = INIT_SCALE,
        factor_scale: float | None = None,
        num_data: int | None = None,
        num_draws: int = 10,
        **trainer_options: Any,
    ) -> None:
        check_role("blora", blora, "blora", call=f"{type(self).__name__}(blora, args=..., train_dataset=...)")
        check_arguments(trainer_options)
        check_count(num_draws=num_draws, least=0)
        check_llm(blora)
        args = trainer_options["args"]
        rates = {"lr": lr, "lr_A": lr_A, "lr_loc": lr_loc, "lr_scale": lr_scale}
        loss: dict[str, Any] = {"kl_weight": kl_weight, "elbo": elbo, "draws": draws, "factor_scale": factor_scale}
        self.options: TrainingOptions = training_options(args, rates, init_scale=init_scale, **loss)
        self.task = _completion_of(trainer_options.get("processing_class")) if task is None else task
        module: dict[str, Any] = {name: loss[name] for name in ("elbo", "draws", "factor_scale")}
        module |= {"init_scale": init_scale, "seed": args.seed}
        self.elbo_module, self._start = start_elbo(blora, self.task, guide, **module)
        self.num_data, self.num_draws = num_data, num_draws
        self._terms, self._is_first_batch = LossTerms(), True
        self._seconds = 0.0
        self._run: dict[str, Any] | None = None
        trainer_options["compute_metrics"] = MetricsUnderDraws(self.task, trainer_options.get("compute_metrics"))
        super().__init__(model=self.elbo_module, **trainer_options)
        check_training_arguments(self.args)  # another trainer may have filled in its own
        self._checks = StepChecks(self.elbo_module)
        self.add_callback(self._checks)
        blora.move_own_tensors()

    @property
    def blora(self) -> BayesianLoRA:
        """The LLM as a Pyro program."""
        return self.elbo_module.blora

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does. Afterwards the LLM rests at the posterior mean.

        Args:
            args: As for the Trainer, such as ``resume_from_checkpoint``.
            kwargs: As for the Trainer.

        Raises:
            FloatingPointError: A loss, a gradient or an update is not finite.
            ValueError: The checkpoint belongs to another run.
        """
        self._begin()
        begin, before = time.perf_counter(), self._seconds
        recompute = bool(getattr(self.args, "gradient_checkpointing", False))
        with training_scope(self.blora, gradient_checkpointing=recompute), self._checks.reach:
            try:
                output = super().train(*args, **kwargs)
            finally:
                self._seconds = before + time.perf_counter() - begin
        self.blora.adapter.rest_at(self.posterior().mean())
        return output

    def _begin(self) -> None:
        """Set N, and let the task learn from the training targets what it must know."""
        data = getattr(self, "train_dataset", None)
        count = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
        size = count or self.num_data
        if self.num_data is not None and count not in (None, self.num_data):
            raise ValueError(f"num_data={self.num_data}, but train_dataset has {count} rows: leave num_data out.")
        if size is None:
            raise ValueError(
                "train_dataset has no length, so the size N of the training set is unknown: pass num_data=N. It "
                "weights the log-likelihood against the KL."
            )
        module = self.elbo_module
        if self.args.gradient_accumulation_steps > 1 and not module.is_row_average:
            raise ValueError(
                f"{type(module.elbo).__name__} is not a sum over rows, so batches cannot be accumulated: use "
                "Trace_ELBO, or gradient_accumulation_steps=1."
            )
        module.begin(size)
        if isinstance(data, EncodedRows) and (targets := [e.target for e in data.examples if e.target is not None]):
            self.task.prepare(targets, are_all=True)
        self._terms, self._is_first_batch = LossTerms(), True
        if self._run is None:  # before the task learns, whose options are part of the run
            self._run = run_of(module, self.options, data)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build AdamW with the parameter groups of :func:`scalabl_pyro.fit`."""
        if self.optimizer is None:
            groups = self.elbo_module.parameter_groups(self.options)
            groups.sort(key=lambda group: group["name"] != "B")  # Trainers log the rate of the first group
            kind, keywords = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **keywords)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], int | None]:
        """Read the batches of one optimizer step, and count their rows."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows, marked = 0, []
        for batch in batches:
            marked.append({**batch, START: rows})
            rows += len(batch["input_ids"])
        self._terms.begin_step()
        return marked, rows or None

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute what a batch contributes to the loss of its optimizer step.

        Args:
            model: The module, as the Trainer has wrapped it.
            inputs: The batch.
            return_outputs: Whether to return a dict with the loss too.
            num_items_in_batch: Number of rows of the step; None for those of the batch.

        Raises:
            FloatingPointError: The loss is not finite.
        """
        module, step = self.elbo_module, self.state.global_step
        batch = as_batch(inputs, self.task)
        rows = len(batch) if num_items_in_batch is None else int(num_items_in_batch)
        start, share = inputs.get(START, 0), len(batch) / rows
        if rows > len(batch) and module.is_sum_over_rows:
            batch = replace(batch, start=start, joint=rows)
        weight = weight_at(self.options.kl_weight, step)
        loss, terms = model(batch, weight, continues=start > 0, validate=self._is_first_batch)
        self._is_first_batch = False
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"At step {step}: the loss is {loss.item()}: {module.explain(batch)}. Parameters keep their values "
                "from before this step. Lower the learning rates, set max_grad_norm, or check these examples."
            )
        kl = terms[2] * module.objective.model.num_data / weight if weight else terms[2] * math.nan
        self._terms.add(share * terms[1], share * kl)
        return (share * loss, {"loss": share * loss}) if return_outputs else share * loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with NLL (nats per row) and KL (nats per data set) beside the loss."""
        if "loss" in logs:
            logs |= self._terms.take()
        super().log(logs, *args, **kwargs)

    def posterior(self) -> Posterior:
        """Copy what was learned so far into a posterior, as :func:`scalabl_pyro.fit` returns it."""
        data = getattr(self, "train_dataset", None)
        provenance = describe_training(
            self.elbo_module,
            self.options,
            data=data,
            num_steps=self.state.global_step,
            seconds=self._seconds,
            start=self._start,
            trainer=type(self).__name__,
        )
        return snapshot(self.blora, self.task, self.elbo_module.guide, provenance)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the posterior to ``posterior/`` in a folder. A checkpoint also gets what a resumption needs."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self.posterior().save_pretrained(folder / POSTERIOR)
        if _internal_call:
            write_state(folder, self.elbo_module, step=self.state.global_step, run=self._run or {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_state(resume_from_checkpoint, self.elbo_module, run=self._run or {}, with_noise=True)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        read_state(best, self.elbo_module, run=self._run or {}, with_noise=False)


def _completion_of(tokenizer: Any) -> Completion:
    if tokenizer is None:
        raise TypeError("The task is missing: pass task=, or processing_class=tokenizer for completions.")
    return Completion(tokenizer)
