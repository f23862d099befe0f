"""Plain LoRA by maximum likelihood: what ScalaBL is compared with (Hu et al., 2022)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..guides import DeltaGuide
from ..model.bayesian_lora import BayesianLoRA, bayesian_lora
from ..tasks import Task
from ..training.fit import fit
from ..training.result import FitResult

#: Learning rate of a point estimate: of the lowest mean NLL on validation, since larger ones overfit hard data.
POINT_LR = 2.5e-4


def mle(
    module: nn.Module,
    task: Task,
    train_data: Any,
    *,
    lr: float = POINT_LR,
    lora: Mapping[str, Any] | None = None,
    **options: Any,
) -> FitResult:
    """Fine-tune the factors A and B alone: y = W0 x + gamma B A x, s = 1 throughout.

    Args:
        module: the base model; it is adapted in place.
        task: the likelihood.
        train_data: as for :func:`scalabl_pyro.fit`.
        lr: of both factors, heads, and the task's parameters.
        lora: options of :func:`scalabl_pyro.bayesian_lora` (rank, targets, ...).
        options: options of :func:`scalabl_pyro.fit` (steps, ...); ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior is a point mass.
    """
    blora = plain_lora(module, lora)
    with unloaded_on_error(blora):
        return fit_point(blora, task, train_data, lr=lr, **options)


def plain_lora(module: nn.Module, lora: Mapping[str, Any] | None = None) -> BayesianLoRA:
    """LoRA without latents: s = 1, and A started as PEFT starts it (B = 0)."""
    blora = bayesian_lora(module, **{**(lora or {}), "gauge": "free"})
    adapter = blora.adapter
    with torch.no_grad():
        # A = diag(s0) Vh is a default nn.Linear init up to a rotation of the bottleneck, so s can be 1.
        for (A, _), s in zip(adapter.factors(), adapter.subspace.split(adapter.loc), strict=True):
            A.mul_(s.to(A.device).unsqueeze(1))
    adapter.rest_at(torch.ones_like(adapter.loc))
    return blora


@contextmanager
def unloaded_on_error(blora: BayesianLoRA) -> Iterator[None]:
    """Give the base model back when training fails, unless the error carries a posterior that needs the adapter."""
    try:
        yield
    except BaseException as error:
        if getattr(error, "result", None) is None:
            blora.unload()
        raise


def fit_point(blora: BayesianLoRA, task: Task, train_data: Any, *, lr: float, **options: Any) -> FitResult:
    """Train A, B and heads, all at one rate, with s held at 1."""
    guide = DeltaGuide(torch.ones_like(blora.adapter.loc), learn=False)
    return fit(blora, task, train_data, guide=guide, kl_weight=0.0, lr=lr, **{"lr_A": lr, **options})
