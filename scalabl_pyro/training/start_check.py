"""Checks before the first step that updates can be made from where the parameters are."""

from typing import NoReturn

import torch
from torch import Tensor, nn

from .messages import names_of, short_name
from .objective import TrainingObjective
from .update_check import UpdateCheck


def check_finite(**modules: nn.Module) -> None:
    """Check trained parameters before distributions are built from them, whose errors would not name them.

    Args:
        modules: Modules, by what messages call them. Parameters of ``point_estimates`` have names of their own.

    Raises:
        ValueError: A parameter is not finite. The message names it.
    """
    unusable = {
        short_name(key) if name == "point_estimates" else f"{short_name(key)} of the {name}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and not torch.isfinite(parameter).all()
    }
    if unusable:
        _refuse(list(unusable), next(iter(unusable.values())))


def check_start(objective: TrainingObjective, check: UpdateCheck | None) -> None:
    """Check that every parameter is finite and can be squared: else every update would be taken back.

    Args:
        objective: Objective, which names its parameters.
        check: Check of the updates; None if there are no updates.

    Raises:
        ValueError: A parameter is not finite, or too large to be squared. The message names it.
    """
    unusable = check.too_large() if check is not None else []
    if unusable:
        _refuse(names_of(objective, unusable), unusable[0])


def _refuse(names: list[str], first: Tensor) -> NoReturn:
    more = f" The same holds for {len(names) - 1} more: {', '.join(names[1:6])}." if len(names) > 1 else ""
    raise ValueError(
        f"Before the first step, {names[0]} {_wrong_in(first)}, so no update can be made.{more} Code outside of "
        "fit has set it, or an earlier training or file has left it so. Give it finite numbers, or pass reset=True to "
        "start from the values that bayesian_lora gave."
    )


def _wrong_in(parameter: Tensor) -> str:
    """Say what is wrong in a parameter, as the end of a sentence."""
    count = int((~torch.isfinite(parameter)).sum())
    if count:
        return f"is NaN or infinite in {count} of {parameter.numel()} numbers"
    return f"has numbers up to {float(parameter.detach().abs().max()):.3g}, too large to be squared"
