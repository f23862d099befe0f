"""LoRA at the mode of its posterior under a normal prior on the factors."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._errors import check_positive
from ..tasks import Task
from ..training.result import FitResult
from .mle import POINT_LR, fit_point, plain_lora, unloaded_on_error


def map_lora(
    module: nn.Module,
    task: Task,
    train_data: Any,
    *,
    scale: float = 1.0,
    lr: float = POINT_LR,
    lora: Mapping[str, Any] | None = None,
    **options: Any,
) -> FitResult:
    """Fine-tune A and B with independent Normal(0, scale) priors on their entries.

    The loss is the mean NLL + (|A|^2 + |B|^2) / (2 N scale^2), nats per example. That is weight decay in the loss with
    coefficient 1 / (N scale^2); AdamW's own ``weight_decay`` is decoupled from the loss and is no prior.

    Args:
        module: the base model; it is adapted in place.
        task: the likelihood.
        train_data: as for :func:`scalabl_pyro.fit`.
        scale: standard deviation of the prior.
        lr: of both factors, heads, and the task's parameters.
        lora: options of :func:`scalabl_pyro.bayesian_lora` (rank, targets, ...).
        options: options of :func:`scalabl_pyro.fit` (steps, ...); ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior is a point mass.

    Raises:
        ValueError: a scale that is not positive and finite.
    """
    check_positive(scale=scale)
    blora = plain_lora(module, lora)
    with unloaded_on_error(blora):
        return fit_point(blora, task, train_data, factor_scale=scale, lr=lr, **options)
