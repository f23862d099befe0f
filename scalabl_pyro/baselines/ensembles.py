"""Deep ensembles: several fine-tunings, and the mixture of their predictions (Lakshminarayanan et al., 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import nn

from .._arguments import check_role, known_arguments_of_methods
from .._process.random_state import scoped_seed
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..prediction.result import NumericPrediction, Prediction
from ..tasks import Task, copy_task
from . import saving
from .point_lora import POINT_LR, fit_point, plain_lora, unloaded_on_error
from .predictor import BaselineResult, DerivedPredictor, Predictor, concatenate


def deep_ensemble(
    module: nn.Module,
    task: Task,
    train_data: Any,
    *,
    num_members: int = 3,
    lr: float = POINT_LR,
    lora: Mapping[str, Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> BaselineResult:
    """Fine-tune plain LoRA several times, with different initial factors and data orders.

    New heads and parameters of the task start from the same values in all members.

    Args:
        module: Base model. It is adapted in place.
        task: Task that encodes the rows and defines the likelihood.
        train_data: Training rows, as for :func:`scalabl_pyro.fit`.
        num_members: Number of fine-tunings, 2 or more. The ScalaBL paper uses 3.
        lr: Learning rate of both factors, the heads, and the task's parameters.
        lora: Options of :func:`scalabl_pyro.bayesian_lora`, such as ``r``. A ``seed`` in it has no effect.
        seed: Seed of the first member. Member i has ``seed + i``.
        options: Options of :func:`scalabl_pyro.fit`, such as ``num_steps``; with ``factor_scale`` of the
            optimizer, the members are maximum a posteriori estimates. ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior is an :class:`EnsemblePosterior`. The history has a column ``member``.

    Raises:
        ValueError: ``num_members`` is less than 2.
        KeyboardInterrupt: Ctrl-C ended a member. The base model is as it was.

    References:
        Lakshminarayanan et al., Simple and Scalable Predictive Uncertainty Estimation, NeurIPS 2017.

    Example:
        >>> result = scalabl_pyro.baselines.deep_ensemble(llm, task, train_data, num_members=3, num_steps=1000)
        >>> result.posterior.predict(test_data).epistemic
    """
    check_role("task", task, "task", call="deep_ensemble(llm, task, train_data)")
    if num_members < 2:
        raise ValueError(f"num_members={num_members}: an ensemble needs 2 or more members. Use mle() for a single one.")
    blora = plain_lora(module, {**(lora or {}), "seed": seed})
    start = {name: p.detach().clone() for name, p in blora.point_estimates.named_parameters()}
    task_start = copy_task(task).state_dict()
    members, histories = [], []
    for member in range(num_members):
        if member > 0:
            _restart(blora, start, seed + member)
            task.load_state_dict(task_start)
        result = fit_point(blora, task, train_data, seed=seed + member, lr=lr, **options)
        with unloaded_on_error(blora):
            result.complete(f"member {member} of {num_members}")
        members.append(result.posterior)
        histories.append(result.history.assign(member=member))
    provenance = {"method": "deep ensemble", "seed": seed}
    return BaselineResult(EnsemblePosterior(tuple(members), provenance), pd.concat(histories, ignore_index=True))


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class EnsemblePosterior(DerivedPredictor):
    """A mixture of predictors with equal weights that share one adapted LLM.

    Attributes:
        members: Point posteriors (one draw each), or predictors that each make several draws.
        provenance: Method and settings that made the ensemble.

    Example:
        >>> mixture = scalabl_pyro.baselines.EnsemblePosterior((posterior, other))
        >>> mixture.predict(test_data, num_draws=10).probs
    """

    kind: ClassVar[str] = "ensemble"

    members: tuple[Predictor, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("An ensemble needs at least one member, got none. Pass predictors as members.")
        if any(member.adapter is not self.adapter for member in self.members):
            raise ValueError(
                "The members of an ensemble must share one adapted LLM, but their adapters differ. Train or load all "
                "members on the same LLM."
            )
        if len({_is_point(member) for member in self.members}) > 1:
            raise ValueError(
                "Point posteriors and posteriors with draws cannot be mixed, because they would not have equal "
                "weights. Pass members of one kind."
            )

    @property
    def source(self) -> Predictor:
        """First member, which gives adapter and task."""
        return self.members[0]

    def _own_facts(self) -> dict[str, object]:
        return {"members": f"{len(self.members)} x {type(self.members[0]).__name__}"}

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction | NumericPrediction:
        """Predict rows under all members.

        Args:
            data: Rows for the task. Answers are optional.
            num_draws: Number of draws per member. A point posterior always gives one draw. 0 predicts with the mean of
                each member.
            seed: Seed of the draws of the first member. Member i has ``seed + i``.
            batch_size: Rows of data per forward pass.
            progress: Whether to show a progress bar.

        Returns:
            A prediction with the draws of all members, in the order of the members.
        """
        own = 0 if _is_point(self.members[0]) else num_draws
        options: dict[str, Any] = {"num_draws": own, "batch_size": batch_size, "progress": progress}
        return concatenate([m.predict(data, seed=seed + i, **options) for i, m in enumerate(self.members)])

    def save_pretrained(self, path: str | Path) -> None:
        """Write each member. :func:`scalabl_pyro.baselines.load` reads them."""
        children = {f"member_{i}": member for i, member in enumerate(self.members)}
        saving.save(path, self.kind, {"provenance": dict(self.provenance)}, children=children)

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], children: Mapping[str, Predictor]
    ) -> "EnsemblePosterior":
        """Build the ensemble from what :func:`scalabl_pyro.baselines.load` has read."""
        return cls(tuple(children.values()), options["provenance"])


def _is_point(member: Predictor) -> bool:
    return isinstance(member, Posterior) and member.guide.is_point


@torch.no_grad()
def _restart(blora: BayesianLoRA, start: Mapping[str, torch.Tensor], seed: int) -> None:
    """Initialize the factors as PEFT does, and reset the heads to their values before the first member."""
    for name, parameter in blora.point_estimates.named_parameters():
        parameter.copy_(start[name])
    with scoped_seed(seed):
        for A, _ in blora.adapter.factors():
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound))
    blora.adapter.keep_start()
