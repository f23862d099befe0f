"""All that training changes, as tensors by name, and back in place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .objective import Objective
from .stein import SteinObjective
from .tensor_files import check_keys


class LearnedState:
    """Factors, heads, parameters of task, prior and guide, and what the optimiser keeps of each.

    Args:
        objective: holds the modules.
        optimiser: of their parameters.
    """

    def __init__(self, objective: Objective | SteinObjective, optimiser: torch.optim.Optimizer) -> None:
        self.objective = objective
        self.optimiser = optimiser

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors: ``module.*``, ``heads.*``, and ``optimiser.<number>.*`` of each parameter it has moved."""
        moments = {
            f"optimiser.{number}.{key}": value
            for number, parameter in enumerate(self._parameters())
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }
        return self._modules() | moments

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of them, where they are."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Overwrite the live tensors, in place: a captured graph goes on using them.

        Raises:
            ValueError: other names, shapes or types; nothing is overwritten then.
        """
        modules, parameters = self._modules(), self._parameters()
        mine = tuple(f"optimiser.{number}." for number in range(len(parameters)))
        moments = {k: v for k, v in saved.items() if k.startswith(mine)}
        check_keys("The saved state", set(saved) - set(moments), set(modules))
        for parameter, prefix in zip(parameters, mine, strict=True):
            for name, tensor in _below(moments, prefix).items():
                if tensor.shape not in ((), parameter.shape):
                    raise ValueError(f"{prefix}{name} was saved as {tuple(tensor.shape)}, expected {parameter.shape}.")
        for name, live in modules.items():
            if (saved[name].shape, saved[name].dtype) != (live.shape, live.dtype):
                raise ValueError(
                    f"{name!r} was saved as {saved[name].dtype} {tuple(saved[name].shape)}, and is {live.dtype} "
                    f"{tuple(live.shape)} now."
                )
        for name, live in modules.items():
            live.copy_(saved[name])
        for parameter, prefix in zip(parameters, mine, strict=True):
            self._load_moments(parameter, _below(moments, prefix))

    def _load_moments(self, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
        state: dict[str, Any] = self.optimiser.state[parameter]
        for key, tensor in saved.items():
            if key in state:
                state[key].copy_(tensor)
            else:
                state[key] = tensor.to(parameter.device, copy=True)  # fused optimisers keep the step count there too
        for key in set(state) - set(saved):
            state[key].zero_()  # as before its first update

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def _modules(self) -> dict[str, Tensor]:
        own = {f"module.{k}": v for k, v in self.objective.state_dict().items()}
        for name, head in self.objective.model.blora.adapter.heads.items():  # buffers; parameters are above
            own |= {f"heads.{name}.{k}": v for k, v in head.named_buffers()}
        return own


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
