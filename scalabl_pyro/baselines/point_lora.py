"""Point estimates of the LoRA factors: maximum likelihood (Hu et al., 2022) and maximum a posteriori."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .._errors import check_scale
from ..guides import DeltaGuide
from ..model.bayesian_lora import BayesianLoRA, bayesian_lora
from ..tasks import Task
from ..training.fit import fit
from ..training.option_groups import optimizer_with
from ..training.result import FitResult

#: Default learning rate of point estimates. It had the lowest mean NLL on validation data; larger rates overfit.
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
    """Fine-tune plain LoRA by maximum likelihood.

    It learns the factors A and B of y = W0 x + gamma B A x, where gamma is lora_alpha / r. The latents s stay at 1.

    Args:
        module: Base model. It is adapted in place.
        task: Task that encodes the rows and defines the likelihood.
        train_data: Training rows, as for :func:`scalabl_pyro.fit`.
        lr: Learning rate of both factors, the heads, and the task's parameters.
        lora: Options of :func:`scalabl_pyro.bayesian_lora`, such as ``r`` and ``target_modules``.
        options: Options of :func:`scalabl_pyro.fit`, such as ``num_steps``. ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior is a point mass.

    References:
        Hu et al., LoRA, ICLR 2022, equation 3.

    Example:
        >>> result = scalabl_pyro.baselines.mle(llm, task, train_data, num_steps=1000)
        >>> result.posterior.predict(test_data).metrics()
    """
    return fit_point(plain_lora(module, lora), task, train_data, lr=lr, **options)


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
    """Fine-tune plain LoRA to the mode of its posterior under Normal(0, scale) priors on the entries of A and B.

    The loss is mean NLL + (|A|^2 + |B|^2) / (2 N scale^2), in nats per example. This is weight decay inside the loss
    with coefficient 1 / (N scale^2). AdamW's own ``weight_decay`` acts outside the loss and does not define a prior.

    Args:
        module: Base model. It is adapted in place.
        task: Task that encodes the rows and defines the likelihood.
        train_data: Training rows, as for :func:`scalabl_pyro.fit`.
        scale: Standard deviation of the prior.
        lr: Learning rate of both factors, the heads, and the task's parameters.
        lora: Options of :func:`scalabl_pyro.bayesian_lora`, such as ``r`` and ``target_modules``.
        options: Options of :func:`scalabl_pyro.fit`, such as ``num_steps``. ``lr_A`` is ``lr`` by default.

    Returns:
        A result whose posterior is a point mass.

    Raises:
        ValueError: ``scale`` is not positive and finite.
        TypeError: ``optimizer=`` has another ``factor_scale``.

    Example:
        >>> result = scalabl_pyro.baselines.map_lora(llm, task, train_data, scale=0.5, num_steps=1000)
        >>> result.posterior.predict(test_data).metrics()
    """
    check_scale(scale=scale)
    optimizer = optimizer_with(options.pop("optimizer", None), factor_scale=scale)
    if optimizer.factor_scale != scale:
        raise TypeError(f"map_lora() got factor_scale={optimizer.factor_scale} in optimizer=: give it as scale=.")
    return fit_point(plain_lora(module, lora), task, train_data, lr=lr, optimizer=optimizer, **options)


def plain_lora(module: nn.Module, lora: Mapping[str, Any] | None = None) -> BayesianLoRA:
    """Adapt a model with LoRA without latents: s = 1, B = 0, and A as PEFT initializes it."""
    blora = bayesian_lora(module, **{**(lora or {}), "gauge": "free"})
    adapter = blora.adapter
    with torch.no_grad():
        # A = diag(s0) Vh is a default nn.Linear init up to a rotation of the bottleneck, so s can be 1.
        for (A, _), s in zip(adapter.factors(), adapter.subspace.split(adapter.loc), strict=True):
            A.mul_(s.to(A.device).unsqueeze(1))
    adapter.rest_at(torch.ones_like(adapter.loc))
    adapter.keep_start()
    return blora


@contextmanager
def unloaded_on_error(blora: BayesianLoRA, convert: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Give the base model back if training fails, unless the error holds a posterior that needs the adapter.

    Args:
        blora: Adapted LLM that is trained inside the context.
        convert: Turns the :class:`FitResult` inside a :class:`TrainingError` into the result of the baseline.
    """
    try:
        yield
    except BaseException as error:
        partial = getattr(error, "result", None)
        if partial is None:
            blora.adapter.unload()
        elif convert is not None:
            error.result = convert(partial)  # type: ignore[attr-defined]
        raise


def fit_point(
    blora: BayesianLoRA,
    task: Task,
    train_data: Any,
    *,
    lr: float,
    convert: Callable[[FitResult], Any] | None = None,
    **options: Any,
) -> Any:
    """Train A, B and the heads at one learning rate, with s fixed at 1; unload the adapter if training fails.

    Args:
        blora: Result of :func:`plain_lora`.
        task: Task that defines the likelihood.
        train_data: Training rows.
        lr: Learning rate.
        convert: Turns the :class:`FitResult` into the result of the baseline, also inside a :class:`TrainingError`.
        options: Options of :func:`scalabl_pyro.fit`.
    """
    guide = DeltaGuide(torch.ones_like(blora.adapter.loc), learn=False)
    with unloaded_on_error(blora, convert):
        result = fit(blora, task, train_data, guide=guide, kl_weight=0.0, lr=lr, **{"lr_A": lr, **options})
    return result if convert is None else convert(result)
