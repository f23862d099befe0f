"""All that training changes, as tensors by name; loading them back in place; the check of a checkpoint's record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..storage.tensor_files import below, check_keys
from .objective import TrainingObjective
from .optimizer import parameters_of

#: What a fused AdamW stores per parameter: a step count, and two tensors of the parameter's shape.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class LearnedState:
    """Factors, heads, parameters of task, prior and guide, and the optimizer's moments of each.

    Args:
        objective: The objective, which holds all modules.
        optimizer: The optimizer of their parameters; None where somebody else keeps its moments.
    """

    def __init__(self, objective: TrainingObjective, optimizer: torch.optim.Optimizer | None) -> None:
        self.objective = objective
        self.optimizer = optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Give the live tensors by name: ``module.*``, ``heads.*``, ``optimizer.<number>.*``."""
        moments = {
            f"optimizer.{number}.{key}": value
            for number, parameter in enumerate(self._parameters())
            for key, value in cast(Any, self.optimizer).state.get(parameter, {}).items()
        }
        return self.modules() | moments

    def trained(self) -> dict[str, Tensor]:
        """Give the live tensors that updates change: trained parameters, and their moments."""
        own = {f"module.{name}" for name, p in self.objective.named_parameters() if p.requires_grad}
        return {name: t for name, t in self.tensors().items() if name in own or name.startswith("optimizer.")}

    def snapshot(self) -> dict[str, Tensor]:
        """Copy all tensors on their own devices."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Overwrite the live tensors in place, because a captured graph continues to use them.

        Args:
            saved: Tensors of the modules, and the optimizer's moments. Moments that are missing become zero.

        Raises:
            ValueError: Names, shapes, types or fixed numbers differ, or parameters are not finite. Nothing is
                overwritten then.
        """
        self.check(saved)
        for name, live in self.modules().items():
            live.copy_(saved[name])
        for number, parameter in enumerate(self._parameters()):
            self._load_moments(parameter, below(saved, f"optimizer.{number}."))

    @torch.no_grad()
    def check(self, saved: Mapping[str, Tensor]) -> None:
        """Check that saved tensors can be loaded.

        Raises:
            ValueError: Names, shapes, types or fixed numbers differ, or parameters are not finite.
        """
        modules, parameters = self.modules(), self._parameters()
        mine = tuple(f"optimizer.{number}." for number in range(len(parameters)))
        moments = {k: v for k, v in saved.items() if k.startswith(mine)}
        check_keys("The saved state", set(saved) - set(moments), set(modules))
        for parameter, prefix in zip(parameters, mine, strict=True):
            if own := below(moments, prefix):
                check_keys(f"The saved state of {prefix[:-1]}", set(own), set(MOMENTS))
            for name, tensor in own.items():
                shape, dtype = (torch.Size(), torch.float32) if name == "step" else (parameter.shape, parameter.dtype)
                _check(prefix + name, tensor, shape, dtype)
                if name != "exp_avg" and bool((tensor < 0).any()):
                    raise ValueError(
                        f"{prefix + name!r} was saved with negative numbers, but it counts or sums squares."
                    )
        learned = {f"module.{name}" for name, _ in self.objective.named_parameters()}
        fixed = {f"module.{name}" for name, p in self.objective.named_parameters() if not p.requires_grad}
        fixed |= {f"module.model.blora.prior.{name}" for name, _ in self.objective.model.blora.prior.named_buffers()}
        for name, live in modules.items():
            is_finite = name in learned or bool(torch.isfinite(live).all())
            _check(name, saved[name], live.shape, live.dtype, finite=is_finite)
            if name in fixed and not torch.equal(saved[name].to(live.device), live):
                raise ValueError(f"{name!r} is held fixed in a run, but was saved with other numbers.")

    def _load_moments(self, parameter: Tensor, saved: Mapping[str, Tensor]) -> None:
        state: dict[str, Any] = cast(Any, self.optimizer).state[parameter]
        for key, tensor in saved.items():
            if key in state:
                state[key].copy_(tensor)
            else:
                state[key] = tensor.to(
                    parameter.device, copy=True
                )  # a fused optimizer keeps the step count on the device too
        for key in set(state) - set(saved):
            state[key].zero_()  # as before the first update of this parameter

    def _parameters(self) -> list[Tensor]:
        return [] if self.optimizer is None else parameters_of(self.optimizer)

    def modules(self) -> dict[str, Tensor]:
        """Give the live tensors of all modules by name, without the moments: ``module.*``, ``heads.*``."""
        own = {f"module.{k}": v for k, v in self.objective.state_dict().items()}
        for (
            name,
            head,
        ) in self.objective.model.blora.adapter.heads.items():  # buffers only: the parameters are in the state dict
            own |= {f"heads.{name}.{k}": v for k, v in head.named_buffers()}
        return own


def check_record(record: Any, columns: Sequence[str], *, step: int, num_steps: int) -> dict[str, Any]:
    """Check the record that a checkpoint stores beside its tensors.

    Args:
        record: The entries ``step``, ``seconds``, ``columns``, ``recovery``, ``data``.
        columns: Columns of a history.
        step: Step in the name of the checkpoint's folder.
        num_steps: Number of steps of the run.

    Returns:
        The record.

    Raises:
        ValueError: An entry has a value that no run writes.
    """
    if not isinstance(record, dict):
        raise ValueError("its record does not say where the run was")
    recovery, data = record.get("recovery"), record.get("data")
    wrong = {
        "step": not _is_count(record.get("step"), step, step) or step > num_steps,
        "seconds": not isinstance(record.get("seconds"), float) or not 0 <= record["seconds"] < math.inf,
        "columns": record.get("columns") not in ([], list(columns)),
        "recovery": not isinstance(recovery, dict)
        or not all(_is_count(recovery.get(name), 0, step) for name in ("skipped", "in_a_row"))
        or not (recovery.get("restored_at", "") is None or _is_count(recovery["restored_at"], 0, step)),
        # Each step reads one batch; one more may have been read ahead.
        "data": data is not None and not (isinstance(data, dict) and _is_count(data.get("count"), 0, step + 1)),
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"the entries {names} of its record have values that no run writes at step {step}")
    return record


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check(name: str, saved: Tensor, shape: torch.Size, dtype: torch.dtype, *, finite: bool = True) -> None:
    if (saved.shape, saved.dtype) != (shape, dtype):
        was, now = f"{saved.dtype} {tuple(saved.shape)}", f"{dtype} {tuple(shape)}"
        raise ValueError(f"{name!r} was saved as {was}, and is {now} now.")
    if finite and saved.is_floating_point() and not torch.isfinite(saved).all():
        raise ValueError(f"{name!r} was saved with numbers that are not finite.")
