"""The ELBO of a data set as a loss module, for a training loop of one's own: Lightning, accelerate, or plain torch."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._arguments import check_role, known_arguments_of_methods
from .._errors import check_count
from .._process.random_state import derive_seed
from ..data.encoding import encode_data
from ..distributed.processes import current_processes
from ..guides import INIT_SCALE, GuideLike
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..tasks import Task
from ..training.objective import weight_at
from ..training.options import DrawsPerBatch, OptimizerOptions, TrainingOptions
from ..training.result import snapshot
from ..training.scope import training_scope
from .trainer.inputs import Collator, EncodedRows, as_batch
from .trainer.records import describe_training
from .trainer.start import check_llm, start_elbo

CALL = "ElboLoss(blora, task, train_data)"


@known_arguments_of_methods
class ElboLoss(nn.Module):
    """The loss -ELBO / N of batches, for a training loop that is yours.

    The loss, the noise, the parameter groups and the posterior are those of :func:`scalabl_pyro.fit`. The loop, the
    optimizer's steps, the schedule and the checkpoints are yours. The parameters of this module are those that the ELBO
    trains. The base model is not a submodule, so a ``state_dict`` is small. Put the LLM on its device before you wrap
    it.

    Args:
        blora: The LLM, as :func:`scalabl_pyro.bayesian_lora` returns it.
        task: The likelihood.
        train_data: The N training rows, in any form that :func:`scalabl_pyro.fit` takes.
        guide: Family of the approximate posterior, as for :func:`scalabl_pyro.fit`.
        lr: Learning rate of B and of the task's parameters.
        lr_A: Learning rate of A and of new heads.
        lr_loc: Learning rate of the guide's locations. None means that of B.
        lr_scale: Learning rate of the guide's scales.
        weight_decay: Weight decay of the factors, as AdamW applies it.
        elbo: A Pyro ELBO, or None for the default one.
        draws: ``"per_example"`` or ``"shared"``.
        init_scale: Largest initial standard deviation of the guide.
        factor_scale: Standard deviation of a prior on the factors, or None.
        seed: Seed of the initial scales and of the noise.

    Raises:
        TypeError: An argument is another kind of object.
        ValueError: Rows do not fit the task, a value is out of its range, or several processes run.

    Example:
        >>> from scalabl_pyro.integrations import ElboLoss
        >>> loss = ElboLoss(blora, task, rows)
        >>> optimizer = torch.optim.AdamW(loss.parameter_groups())
        >>> for batch in loss.batches(batch_size=4):
        ...     optimizer.zero_grad()
        ...     loss(batch)["loss"].backward()
        ...     optimizer.step()
        >>> posterior = loss.posterior()
    """

    def __init__(
        self,
        blora: BayesianLoRA,
        task: Task,
        train_data: Any,
        *,
        guide: GuideLike = "normal",
        lr: float = 8e-3,
        lr_A: float = 2.5e-4,
        lr_loc: float | None = None,
        lr_scale: float = 3e-2,
        weight_decay: float = 0.0,
        elbo: ELBO | None = None,
        draws: DrawsPerBatch = "per_example",
        init_scale: float = INIT_SCALE,
        factor_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_role("blora", blora, "blora", call=CALL)
        check_role("task", task, "task", call=CALL)
        if current_processes().size > 1:
            raise ValueError("ElboLoss runs in one process: use scalabl_pyro.fit, which trains in several.")
        check_llm(blora)
        steps = OptimizerOptions(lr_loc=lr_loc, lr_scale=lr_scale, weight_decay=weight_decay, factor_scale=factor_scale)
        of_loss: dict[str, Any] = {"elbo": elbo, "draws": draws, "init_scale": init_scale, "seed": seed}
        self.options = TrainingOptions(lr=lr, lr_A=lr_A, optimizer=steps, **of_loss)
        self.dataset = EncodedRows(encode_data(train_data, task.encode, need_target=True))
        task.check_llm(blora.adapter, self.dataset.examples)
        self.module, self._start = start_elbo(blora, task, guide, factor_scale=factor_scale, **of_loss)
        self.module.begin(len(self.dataset))
        task.prepare([row.target for row in self.dataset.examples if row.target is not None], are_all=True)
        blora.move_own_tensors()
        self._steps = 0

    @property
    def blora(self) -> BayesianLoRA:
        """The LLM as a Pyro program."""
        return self.module.blora

    def batches(self, *, batch_size: int, **options: Any) -> DataLoader:
        """Make a loader of shuffled batches. The seed of the loss decides the order.

        Args:
            batch_size: Number B of rows per batch.
            options: Other options of ``torch.utils.data.DataLoader``, such as ``generator`` or ``num_workers``.

        Returns:
            Loader of batches, each a dict of tensors.

        Example:
            >>> len(loss.batches(batch_size=4))
            2
        """
        check_count(batch_size=batch_size)
        collate = Collator(self.module.objective.model.task.pad_token_id)
        order = torch.Generator().manual_seed(derive_seed(self.options.seed, "order of the rows"))
        has_order = options.get("sampler") is not None
        settings: dict[str, Any] = {"shuffle": not has_order, "collate_fn": collate, "generator": order} | options
        return DataLoader(self.dataset, batch_size, **settings)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the trained parameters in groups, each with its learning rate, for an optimizer of torch.

        Returns:
            Groups ``A``, ``B``, ``heads``, ``task``, ``loc`` and ``scale``, as far as they have parameters.

        Example:
            >>> [group["name"] for group in loss.parameter_groups()]
            ['A', 'B', 'loc', 'scale']
        """
        return self.module.parameter_groups(self.options)

    def forward(self, batch: Mapping[str, Tensor], kl_weight: float = 1.0) -> dict[str, Tensor]:
        """Compute the loss of a batch, with noise of its own.

        Args:
            batch: Batch of a loader of :meth:`batches`, on the device of the LLM.
            kl_weight: Weight of the KL, such as a factor that grows during a warm-up.

        Returns:
            ``loss``, to differentiate, and ``nll``, both in nats per row; ``kl``, the weighted KL in nats of the whole
            data set. All are of shape ().

        Raises:
            FloatingPointError: The loss is not finite.
            ValueError: The batch is on another device than the LLM, or has no answers.
        """
        rows, device = as_batch(batch, self.module.objective.model.task), self.blora.device
        if rows.index.device != device:
            raise ValueError(
                f"The batch is on {rows.index.device}, and the LLM on {device}: move the LLM before bayesian_lora(llm)."
            )
        if rows.target is None:
            raise ValueError("The batch has no answers (labels), which the loss needs: give the batches of batches().")
        with training_scope(self.blora):
            loss, terms = self.module(rows, weight_at(kl_weight, 0), validate=self._steps == 0)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()}: {self.module.explain(rows)}. Lower the rates.")
        self._steps += self.training
        return {"loss": loss, "nll": terms[1], "kl": terms[2] * len(self.dataset)}

    def posterior(self) -> Posterior:
        """Copy what was learned so far into a posterior. Afterwards the LLM rests at its mean.

        Returns:
            The posterior, as :func:`scalabl_pyro.fit` returns it. ``provenance["num_steps"]`` counts batches.
        """
        record = describe_training(
            self.module,
            self.options,
            data=self.dataset,
            num_steps=self._steps,
            seconds=0.0,
            start=self._start,
            trainer=type(self).__name__,
        )
        left_out = ("seconds", "batch_size")  # the loop knows them
        known = {name: value for name, value in record.items() if name not in left_out}
        found = snapshot(self.blora, self.module.objective.model.task, self.module.guide, known)
        self.blora.adapter.rest_at(found.mean())
        return found
