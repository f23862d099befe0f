"""What a training returns: the posterior as it was learned, frozen, with its history; or an error that holds them."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..guides import Guide
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..tasks import Task


@dataclass(frozen=True)
class FitResult:
    """What :func:`scalabl_pyro.fit` returns.

    Attributes:
        posterior: frozen; later training does not change it.
        history: one row a step: ``step``, ``loss`` and ``nll`` (nats per example), ``kl`` (nats per data set,
            unweighted), ``kl_weight``, ``grad_norm`` (before clipping), ``lr`` of B, ``seconds`` since the start, and
            ``skipped``, the number of steps left out so far because they were not finite.
    """

    posterior: Posterior
    history: pd.DataFrame


class TrainingError(FloatingPointError):
    """A loss, gradient or parameter that is not finite.

    Attributes:
        result: the :class:`FitResult` of all steps before; None if it was the first step, or if the parameters were no
            posterior any more.
    """

    result: FitResult | None = None


@torch.no_grad()
def freeze(blora: BayesianLoRA, task: Task, guide: Guide, provenance: dict[str, Any]) -> Posterior:
    """Copy what was learned into a posterior; the module itself rests at the posterior mean."""
    adapter = blora.adapter
    if adapter.gauge == "unit_rows":
        for A, _ in adapter.factors():
            if A.requires_grad:  # factors held fixed have unit rows already, and stay as they are to the last bit
                A.copy_(nn.functional.normalize(A, dim=-1))
    posterior = Posterior.capture(blora, task, guide, provenance=provenance)
    adapter.rest_at(posterior.mean())
    return posterior
