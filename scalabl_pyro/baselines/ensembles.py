"""Several fine-tunings from different starts, and the mixture of their predictions (Lakshminarayanan et al., 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import nn

from .._process.random_state import scoped_seed
from ..guides import DeltaGuide
from ..lora.adapter import Adapter
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..prediction.result import NumericPrediction, Prediction
from ..tasks import Task, copy_task
from . import saving
from .point_lora import POINT_LR, fit_point, plain_lora, unloaded_on_error
from .predictor import BaselineResult, Predictor, concatenate


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
    """Fine-tune plain LoRA several times, each from factors and with an order of the data of its own.

    New heads, and parameters of the task, start from the same values in all members.

    Args:
        module: the base model; it is adapted in place.
        task: the likelihood.
        train_data: as for :func:`scalabl_pyro.fit`.
        num_members: number of fine-tunings; 3 in the ScalaBL paper.
        lr: of both factors, heads, and the task's parameters.
        lora: options of :func:`scalabl_pyro.bayesian_lora` (rank, targets, ...); its ``seed`` is that of the ensemble.
        seed: of the first member; the others count on from it.
        options: options of :func:`scalabl_pyro.fit` (steps, ``factor_scale`` for members at the mode, ...); ``lr_A`` is
            ``lr`` by default.

    Returns:
        A result whose posterior is an :class:`EnsemblePosterior`; the history has a column ``member``.

    Raises:
        ValueError: fewer than 2 members.
    """
    if num_members < 2:
        raise ValueError(f"num_members={num_members}: an ensemble has 2 or more.")
    blora = plain_lora(module, {**(lora or {}), "seed": seed})
    start = {name: p.detach().clone() for name, p in blora.point_estimates.named_parameters()}
    task_start = copy_task(task).state_dict()
    members, histories = [], []
    for member in range(num_members):
        if member > 0:
            _restart(blora, start, seed + member)
            task.load_state_dict(task_start)
        with unloaded_on_error(blora):
            result = fit_point(blora, task, train_data, seed=seed + member, lr=lr, **options)
        members.append(result.posterior)
        histories.append(result.history.assign(member=member))
    provenance = {"method": "deep ensemble", "seed": seed}
    return BaselineResult(EnsemblePosterior(tuple(members), provenance), pd.concat(histories, ignore_index=True))


@dataclass(frozen=True)
class EnsemblePosterior:
    """The mixture, with equal weights, of predictors that share one LLM.

    Attributes:
        members: point posteriors (one draw each), or predictors with draws of their own.
        provenance: how it came about.
    """

    kind: ClassVar[str] = "ensemble"

    members: tuple[Predictor, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("An ensemble needs at least one member.")
        if any(member.adapter is not self.adapter for member in self.members):
            raise ValueError("The members of an ensemble must share one adapted LLM, but their adapters differ.")
        if len({_is_point(member) for member in self.members}) > 1:
            raise ValueError("Point posteriors and posteriors with draws cannot be mixed: their weights would differ.")

    @property
    def adapter(self) -> Adapter:
        """The LoRA layers inside the LLM."""
        return self.members[0].adapter

    @property
    def task(self) -> Task:
        """The likelihood of the first member."""
        return self.members[0].task

    def blora(self) -> BayesianLoRA:
        """The adapted LLM, to unload."""
        return self.members[0].blora()

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction | NumericPrediction:
        """Predict rows under all members.

        Args:
            data: rows for the task; answers are optional.
            num_draws: draws of each member, one member behind the other; a point posterior counts as one draw, whatever
                this says. 0 predicts with the mean of each member.
            seed: of the draws of the first member; the others count on from it.
            batch_size: rows of data a pass.
            progress: show a progress bar.
        """
        own = 0 if _is_point(self.members[0]) else num_draws
        options: dict[str, Any] = {"num_draws": own, "batch_size": batch_size, "progress": progress}
        return concatenate([m.predict(data, seed=seed + i, **options) for i, m in enumerate(self.members)])

    def save_pretrained(self, path: str | Path) -> None:
        """Write each member; :func:`scalabl_pyro.baselines.load` reads them."""
        children = {f"member_{i}": member for i, member in enumerate(self.members)}
        saving.save(path, self.kind, {"provenance": dict(self.provenance)}, children=children)

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], children: Mapping[str, Predictor]
    ) -> "EnsemblePosterior":
        """What :func:`scalabl_pyro.baselines.load` read."""
        return cls(tuple(children.values()), options["provenance"])


def _is_point(member: Predictor) -> bool:
    return isinstance(member, Posterior) and isinstance(member.guide, DeltaGuide)


@torch.no_grad()
def _restart(blora: BayesianLoRA, start: Mapping[str, torch.Tensor], seed: int) -> None:
    """New factors as PEFT starts them; heads as before the first member."""
    for name, parameter in blora.point_estimates.named_parameters():
        parameter.copy_(start[name])
    with scoped_seed(seed):
        for A, _ in blora.adapter.factors():
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound))
