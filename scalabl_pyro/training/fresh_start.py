"""Where a training starts: at the values of the wrapping, or at those that an earlier training left."""

import weakref
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..model.bayesian_lora import BayesianLoRA
from ..tasks import Task

Start = Literal["fresh", "continued"]

#: Learned parameters of a prior or a task before its first training, by the module.
_FIRST: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def choose_start(blora: BayesianLoRA, task: Task, *, reset: bool) -> list[str]:
    """Find what was trained before, and undo it if the caller asks for that.

    Factors, latents and new heads are compared with their values at the wrapping. Parameters of the prior and of the
    task are compared with their values before the first training in this process.

    Args:
        blora: The LLM.
        task: The task.
        reset: Whether to put all of them back to these values.

    Returns:
        What the training goes on from, in words; empty for a fresh start.
    """
    moved = []
    adapter = blora.adapter
    if any(p.requires_grad for p in blora.point_estimates.parameters()):  # refit holds them fixed on purpose
        if reset:
            adapter.restart()
        elif adapter.has_moved():
            moved.append("the LoRA factors and latents")
    for name, module in {"prior": blora.prior, "task": task}.items():
        first = _FIRST.setdefault(module, {key: p.detach().cpu().clone() for key, p in _learned(module)})
        for key, parameter in _learned(module):
            if key not in first or torch.equal(parameter.cpu(), first[key].to(parameter.dtype)):
                continue
            if reset:
                parameter.copy_(first[key])
            else:
                moved.append(f"{key.removesuffix('_unconstrained')} of the {name}")
    return moved


def _learned(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
