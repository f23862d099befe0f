"""The negative ELBO as a module with the trained parameters, which stands in for the model of a Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from ..._process.random_state import Stream
from ...data.batch import Batch
from ...guides import Guide
from ...lora.gradient_checkpointing import dropouts_of
from ...model.bayesian_lora import BayesianLoRA
from ...model.joint import TaskModel
from ...tasks import Task
from ...training.objective import Objective, ScopedGuide, allows_row_draws, elbo_for, explain_nonfinite
from ...training.optimizer import parameter_groups
from ...training.options import TrainingOptions
from ...training.scope import step_scope
from ...training.score_function import LeaveOneOutELBO


class ElboModule(nn.Module):
    """The loss of a batch. Its parameters are those that the ELBO trains; the base model is not a submodule.

    What a Trainer asks of its model besides, such as ``config``, comes from the LLM.

    Args:
        blora: The LLM.
        task: The likelihood.
        guide: The guide.
        elbo: Estimator, or None for the default one.
        draws: ``"per_example"`` or ``"shared"``.
        factor_scale: Standard deviation of a prior on the factors, or None.
        seed: Seed of the noise.

    Raises:
        ValueError: The guide does not fit the prior, or it is trained without a loss.
    """

    #: Trainers then leave it to the loss to divide by the number of rows of a step.
    accepts_loss_kwargs = True
    #: A quantized LLM may be trained, because it has adapters.
    _hf_peft_config_loaded = True

    def __init__(
        self,
        blora: BayesianLoRA,
        task: Task,
        guide: Guide,
        *,
        elbo: ELBO | None,
        draws: str,
        factor_scale: float | None,
        seed: int,
    ) -> None:
        super().__init__()
        if guide.method == "SVGD":
            raise ValueError("guide='svgd' has no loss that a Trainer could minimize: use scalabl_pyro.fit.")
        self.elbo = elbo_for(elbo, guide, blora.prior)
        if not hasattr(self.elbo, "differentiable_loss"):
            raise ValueError(f"{type(self.elbo).__name__} computes its own gradients: use Trace_ELBO.")
        draws = draws if guide.per_example and allows_row_draws(self.elbo) else "shared"
        self.noise = Stream(seed)
        self._build: Callable[[int], TaskModel] = lambda num_data: TaskModel(
            blora, task, num_data=num_data, draws=draws, factor_scale=factor_scale
        )
        self.objective = Objective(self.elbo, self._build(1), ScopedGuide(guide, draws=draws))
        self._step_start: dict[str, Tensor] = {}

    @property
    def blora(self) -> BayesianLoRA:
        """The LLM as a Pyro program."""
        return self.objective.model.blora

    @property
    def guide(self) -> Guide:
        """The guide."""
        return self.objective.guide.guide

    @property
    def is_sum_over_rows(self) -> bool:
        """Whether the batches of a step can share their noise, as one large batch does."""
        return allows_row_draws(self.elbo) and not isinstance(self.elbo, LeaveOneOutELBO)

    @property
    def is_row_average(self) -> bool:
        """Whether the average of the losses of two batches is an unbiased loss of both together."""
        return allows_row_draws(self.elbo)

    def begin(self, num_data: int) -> None:
        """Set the size N of the training set."""
        self.objective = Objective(self.elbo, self._build(num_data), self.objective.guide)

    def forward(
        self, batch: Batch, kl_weight: float = 1.0, *, continues: bool = False, validate: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: The batch.
            kl_weight: Weight of the KL.
            continues: Whether the batch belongs to the same optimizer step as the one before, so that the noise of the
                step is drawn again.
            validate: Whether Pyro checks the arguments of distributions.

        Returns:
            () Loss to differentiate, and (3,) loss, NLL and weighted KL, nats per example.
        """
        if continues and self.is_sum_over_rows:
            self.noise.load_states(self._step_start)
        else:
            self._step_start = self.noise.states()
        with step_scope(self.noise, validate=validate):
            return self.objective.loss(batch, kl_weight)

    def parameter_groups(self, options: TrainingOptions) -> list[dict[str, Any]]:
        """Sort the trained parameters into groups with the rates of the options, as :func:`scalabl_pyro.fit` does."""
        optimizer = options.optimizer
        return parameter_groups(
            self.objective.model,
            self.guide,
            lr=options.lr,
            lr_A=options.lr_A,
            lr_loc=options.lr_loc,
            lr_scale=optimizer.lr_scale,
            weight_decay=optimizer.weight_decay,
        )

    def explain(self, batch: Batch) -> str:
        """Say why the loss of a batch is not finite."""
        with step_scope(self.noise):
            return explain_nonfinite(self.objective.model, self.objective.guide, batch)

    def train(self, mode: bool = True) -> "ElboModule":
        """Set the mode. The base model keeps its own: its dropout would be noise that the ELBO does not know."""
        self.training = mode
        for part in (self.guide, self.objective.model.task, *dropouts_of(self.blora.adapter)):
            part.train(mode)
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the training runs blocks again by itself, with the same draws."""

    activation_checkpointing_enable = gradient_checkpointing_enable

    def __getattr__(self, name: str) -> Any:
        """Give an attribute of this module, or a public one of the LLM."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "objective" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.blora.llm, name)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers of all tensors are finite."""
    return bool(torch.isfinite(nn.utils.get_total_norm(tensors))) if tensors else True
