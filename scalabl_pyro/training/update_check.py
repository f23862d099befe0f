"""Checks all parameters after an update, and takes an update back that was too large.

A learning rate or a weight decay can be so large that float32 cannot hold the result of an update, while loss and
gradient before it are finite. The next step would only meet the ruins.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.distributions.transforms import ExpTransform

#: Integers of the same width as a floating-point type.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


#: Learning rates below which no parameter gets from 1 to 1e18 in a million updates, each 10 times the rate at most.
QUICK_BELOW = 1e9


class UpdateCheck:
    """Keep the parameters before an update, and put them back if the update was too large.

    An update is too large if the square of a parameter is not finite after it. Parameters that are logarithms count
    with their exponential. On a GPU nothing waits for the host, so that a CUDA graph can hold the check.

    Args:
        parameters: Parameters that the update changes.
        logarithms: Those of them that are logarithms, see :func:`logarithms_of`.
        largest_rate: Largest learning rate of an optimizer whose updates are of the size of the rate, as those of Adam
            are. If it is small, a parameter that is finite can also be squared, and the check is faster.

    Attributes:
        rejected: Parameters for which the host took the last update back; empty on a GPU, where the device does it.

    Example:
        >>> weight = torch.ones(3)
        >>> check = UpdateCheck([weight])
        >>> check.keep()
        >>> _ = weight.mul_(1e30)  # an update; its square is beyond float32
        >>> check.settle().item(), weight
        (inf, tensor([1., 1., 1.]))
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, logarithms: Sequence[Tensor] = (), largest_rate: float = math.inf
    ) -> None:
        self.parameters = list(parameters)
        self.logarithms = [p for p in logarithms if p.numel()]
        self.kept = [torch.empty_like(p) for p in self.parameters]
        self.rejected: list[Tensor] = []
        devices = {p.device for p in self.parameters}
        self.stays_on_device = len(devices) == 1 and next(iter(devices)).type == "cuda"
        are_alike = {(p.device, p.dtype) for p in self.parameters} <= {(d, torch.float32) for d in devices}
        self.is_quick = largest_rate < QUICK_BELOW and are_alike and len(devices) == 1
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._one = torch.ones((), device=device, dtype=torch.float32)  # whatever the default dtype is
        self._found = torch.zeros((), device=device, dtype=torch.float32)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the parameters, before an update."""
        if self.parameters:
            torch._foreach_copy_(self.kept, self.parameters)

    @torch.no_grad()
    def settle(self) -> Tensor:
        """Take the update back if it was too large.

        Returns:
            () 0, or infinity if it was taken back.
        """
        found = self._find()
        if self.stays_on_device:
            for log in self.logarithms:
                found = torch.maximum(found, (~(log.max() < _limit(log.dtype))).to(found))
            self._put_back_where(found > 0)
            return torch.where(found > 0, torch.inf, 0.0)
        if not found and all(log.max() < _limit(log.dtype) for log in self.logarithms):
            return found
        self.rejected = self._largest()
        torch._foreach_copy_(self.parameters, self.kept)
        return torch.full_like(found, torch.inf)

    @torch.no_grad()
    def too_large(self) -> list[Tensor]:
        """List the parameters for which every update would be taken back, whatever it is."""
        is_fine = not self._find() and all(log.max() < _limit(log.dtype) for log in self.logarithms)
        return [] if is_fine else self._largest()

    def _largest(self) -> list[Tensor]:
        return [p for p in self.parameters if self._is_too_large(p)]

    def _find(self) -> Tensor:
        """() 1 if a parameter is not finite, or cannot be squared; else 0."""
        self._found.zero_()
        if self.is_quick:  # what a GradScaler calls on gradients: it multiplies by 1, and notes what is not finite
            torch._amp_foreach_non_finite_check_and_unscale_(self.parameters, self._found, self._one)
        else:
            self._found.copy_(~torch.isfinite(_size(self.parameters)))
        return self._found

    def _is_too_large(self, parameter: Tensor) -> bool:
        is_log = any(parameter is log for log in self.logarithms)
        return not torch.isfinite(parameter.norm()) or (is_log and not bool(parameter.max() < _limit(parameter.dtype)))

    def _put_back_where(self, is_bad: Tensor) -> None:
        """Copy the kept values back if a flag on the device says so.

        It computes with the bits as integers, p + flag * (kept - p), because a product of 0 and NaN would be NaN.
        """
        by_width: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            dtype = _INTEGERS[parameter.element_size()]
            bits, kept_bits = by_width.setdefault(dtype, ([], []))
            bits.append(parameter.detach().view(dtype))
            kept_bits.append(kept.view(dtype))
        for dtype, (bits, kept_bits) in by_width.items():
            torch._foreach_sub_(kept_bits, bits)
            torch._foreach_mul_(kept_bits, is_bad.to(dtype))
            torch._foreach_add_(bits, kept_bits)


def _size(parameters: Sequence[Tensor]) -> Tensor:
    """() Sum of the norms of tensors; infinite if float32 cannot hold a square."""
    if not parameters:
        return torch.zeros(())
    norms = torch._foreach_norm(list(parameters))
    first = norms[0]
    if any(norm.dtype != first.dtype or norm.device != first.device for norm in norms):
        norms = tuple(norm.to(first.device, torch.float64) for norm in norms)
    return torch.stack(norms).sum()


def logarithms_of(module: nn.Module) -> list[Tensor]:
    """Find the parameters that Pyro keeps as logarithms, because their value must be positive: scales, mostly.

    Args:
        module: Guide and prior, or a module that holds them.

    Returns:
        (...) Unconstrained parameters.
    """
    return [
        parameter
        for part in module.modules()
        if isinstance(part, PyroModule)
        for name, (constraint, _) in part._pyro_params.items()
        if (parameter := part._parameters.get(f"{name}_unconstrained")) is not None
        and any(isinstance(step, ExpTransform) for step in _steps(transform_to(constraint)))
    ]


def _steps(transform: Any) -> list[Any]:
    """The transforms that one transform consists of."""
    parts = getattr(transform, "parts", None) or [getattr(transform, "base_transform", None)]
    return [transform] if parts == [None] else [step for part in parts for step in _steps(part)]


def _limit(dtype: torch.dtype) -> float:
    """The largest logarithm of a number whose square a floating-point type can hold."""
    return math.log(torch.finfo(dtype).max) / 2
