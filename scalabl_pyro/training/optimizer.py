"""One AdamW over named parameter groups, its learning-rate schedule, and the gradient norm."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..guides import Guide
from ..model.joint import TaskModel


def build_optimizer(
    model: TaskModel,
    guide: Guide,
    *,
    lr: float,
    lr_A: float,
    lr_loc: float,
    lr_scale: float,
    weight_decay: float,
    capturable: bool = False,
) -> torch.optim.AdamW:
    """Build one AdamW over named groups. Groups without parameters are left out.

    Where a model lies on several devices, each group is split by device, because a fused update runs on one.

    Args:
        model: The joint model.
        guide: The guide.
        lr: Learning rate of B and of the task's parameters.
        lr_A: Learning rate of A and of new heads.
        lr_loc: Learning rate of the guide's locations.
        lr_scale: Learning rate of scales in guide and prior.
        weight_decay: Decay of B, and of A if the gauge is ``"free"``. With unit rows only the directions of the rows of
            A matter. Decay would only shorten the rows, so that the same step turns them further.
        capturable: Whether step counts and learning rates are tensors on the device, which a CUDA graph reads at each
            replay.
    """
    groups = parameter_groups(
        model, guide, lr=lr, lr_A=lr_A, lr_loc=lr_loc, lr_scale=lr_scale, weight_decay=weight_decay
    )
    groups = split_by_device(groups)
    for group in groups:
        group["initial_lr"] = group["lr"]
        if capturable:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device, dtype=torch.float32)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True, capturable=capturable)


def parameter_groups(
    model: TaskModel, guide: Guide, *, lr: float, lr_A: float, lr_loc: float, lr_scale: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Sort all trained parameters into named groups, each with its learning rate and its weight decay.

    Groups without parameters are left out. The arguments are those of :func:`build_optimizer`.
    """
    point = list(model.blora.point_estimates.named_parameters())
    scales = [*_named(guide, scale=True), *_named(model.blora.prior, scale=True)]
    decay_A = weight_decay if model.blora.adapter.gauge == "free" else 0.0
    groups: list[dict[str, Any]] = [
        {"name": "A", "params": [p for n, p in point if n.endswith("/A")], "lr": lr_A, "weight_decay": decay_A},
        {"name": "B", "params": [p for n, p in point if n.endswith("/B")], "lr": lr, "weight_decay": weight_decay},
        {"name": "heads", "params": [p for n, p in point if not n.endswith(("/A", "/B"))], "lr": lr_A},
        {"name": "task", "params": [*model.task.parameters(), *_named(model.blora.prior, scale=False)], "lr": lr},
        {"name": "loc", "params": _named(guide, scale=False), "lr": lr_loc},
        {"name": "scale", "params": scales, "lr": lr_scale},
    ]
    trainable = [{"weight_decay": 0.0} | g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    return [group for group in trainable if group["params"]]


def split_by_device(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups so that the parameters of each lie on one device.

    Each part notes the positions of its parameters among all parameters, so that :func:`parameters_of` lists them in
    one order, on whatever devices they lie: checkpoints and sums over processes number the parameters.

    Args:
        groups: Groups, each with its ``params``.
    """
    parts, first = [], 0
    for group in groups:
        by_device: dict[torch.device, list[int]] = {}
        for number, parameter in enumerate(group["params"]):
            by_device.setdefault(parameter.device, []).append(number)
        for numbers in by_device.values():
            own = [group["params"][number] for number in numbers]
            parts.append(group | {"params": own, "positions": [first + number for number in numbers]})
        first += len(group["params"])
    return parts


def _named(module: nn.Module, *, scale: bool) -> list[nn.Parameter]:
    """Parameters named as scales, or all others. Correlations (``scale_tril``) count as locations."""
    return [p for name, p in module.named_parameters() if ("scale" in name and "tril" not in name) == scale]


def rate_schedule(schedule: str, warmup: float, num_steps: int) -> Callable[[int], float]:
    """Give the learning-rate factor of each step: a linear rise in the warm-up, then constant, or linear to 0.

    Args:
        schedule: ``"linear"`` or ``"constant"``.
        warmup: Share of the steps in which the factor rises.
        num_steps: Number of steps.

    Returns:
        A function from the step, counted from 0, to the factor.
    """
    rise = max(round(warmup * num_steps), 1)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 1.0 if schedule == "constant" else (num_steps - step) / max(num_steps - rise, 1)

    return factor


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of each group to ``factor`` times the rate it started with.

    On a GPU rates are rounded to float32, because a captured update can read no other ones. So eager updates and
    captured ones are the same, also in float64. From the updates of a CPU they differ by 2^-25 of their size at most.
    """
    for group in optimizer.param_groups:
        base = group.setdefault("initial_lr", float(group["lr"]))
        if torch.is_tensor(group["lr"]):  # a captured graph reads it from this tensor
            group["lr"].fill_(base * factor)
        else:
            group["lr"] = ctypes.c_float(base * factor).value if _is_on_gpu(group) else base * factor


def _is_on_gpu(group: dict[str, Any]) -> bool:
    return any(parameter.is_cuda for parameter in group["params"][:1])


def parameters_of(optimizer: Any) -> list[Tensor]:
    """List all parameters, in the order of the groups before they were split by device."""
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all("positions" in group for group in optimizer.param_groups):
        return listed
    positions = [position for group in optimizer.param_groups for position in group["positions"]]
    return [parameter for _, parameter in sorted(zip(positions, listed, strict=True), key=lambda pair: pair[0])]


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """Scale gradients down to a global norm of ``limit``. If the norm is not finite, gradients stay as they are.

    Returns:
        () The norm before clipping.
    """
    parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        # NaN would spread to all gradients and hide where it came from; no update follows.
        nn.utils.clip_grads_with_norm_(parameters, limit, norm.nan_to_num(limit, posinf=limit))
    return norm
