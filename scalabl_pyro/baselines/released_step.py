"""The optimizer step of the released ScalaBL code: AdamW on the NLL, then SGD on the weighted KL.

On a GPU a CUDA graph replays the gradient of the NLL, which is nearly all of the work. The two updates run eagerly.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..training.graphed_step import GraphedStep
from ..training.optimizer import parameters_of, set_rates
from ..training.step import EagerStep
from ..training.update_check import UpdateCheck


class Latents(Protocol):
    """A distribution q(s) with learned parameters."""

    def parameters(self) -> Any:
        """Return the parameters that SGD updates."""

    def draw(self) -> Tensor:
        """Return one reparametrized draw (D,)."""

    def kl(self) -> Tensor:
        """Return the KL in nats."""


class AlternatingStep:
    """Update all parameters with AdamW on the NLL, then those of q(s) with SGD on the weighted KL.

    Args:
        latents: Distribution q(s).
        learned: Parameters besides those of q(s): A, B, heads, and the task's parameters.
        lr: Learning rate of AdamW.
        lr_kl: Learning rate of SGD.
    """

    def __init__(self, latents: Latents, learned: Sequence[nn.Parameter], *, lr: float, lr_kl: float) -> None:
        self.latents = latents
        self.adamw = torch.optim.AdamW([*learned, *latents.parameters()], lr=lr, eps=1e-6, weight_decay=0.0)
        self.sgd = torch.optim.SGD(latents.parameters(), lr=lr_kl)
        self.check = UpdateCheck(parameters_of(self.adamw), logarithms=list(latents.parameters()))
        for p in parameters_of(self.adamw):
            p.grad = torch.zeros_like(p)  # from then on it keeps its memory, which a CUDA graph captures

    def __call__(self, nll: Callable[[Tensor], Tensor], *, weight: float, rate: float) -> tuple[float, float]:
        """Make both updates; return the mean NLL before them, and the KL between them.

        Args:
            nll: Mean NLL of a batch as a function of s.
            weight: Weight pi_i of the KL.
            rate: Factor of both learning rates.

        Raises:
            FloatingPointError: The NLL or the KL is not finite, and the update that belongs to it was not made; or an
                update was too large, and was taken back.
        """
        return self.update(self.gradient(nll), weight=weight, rate=rate)

    def gradient(self, nll: Callable[[Tensor], Tensor]) -> Tensor:
        """Put the gradient of the NLL into ``.grad``, in the same memory as before; return the NLL."""
        self.adamw.zero_grad(set_to_none=False)
        loss = nll(self.latents.draw())
        loss.backward()
        return loss.detach()

    def update(self, loss: Tensor, *, weight: float, rate: float) -> tuple[float, float]:
        """Make the AdamW update with the gradient in ``.grad``, then the SGD update; see :meth:`__call__`."""
        set_rates(self.adamw, rate)
        set_rates(self.sgd, rate)
        value = _finite("NLL", loss)
        self._checked(self.adamw)
        kl = self.latents.kl()
        _finite("KL", weight * kl)
        self.sgd.zero_grad(set_to_none=False)
        (weight * kl).backward()
        self._checked(self.sgd)
        return value, kl.item()

    def _checked(self, optimizer: torch.optim.Optimizer) -> None:
        self.check.keep()
        optimizer.step()
        if not torch.isfinite(self.check.settle()):
            raise FloatingPointError("The update was too large and was taken back.")


class GradientObjective:
    """The mean NLL of a batch under one draw, as an objective of :class:`~scalabl_pyro.training.step.EagerStep`.

    Args:
        step: Puts the gradient into ``.grad``.
        nll: Maps a batch to its mean NLL as a function of s.
    """

    def __init__(self, step: AlternatingStep, nll: Callable[[Batch], Callable[[Tensor], Tensor]]) -> None:
        self.step = step
        self.nll = nll

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Keep the gradients: ``accumulate`` sets them to zero in the memory that a CUDA graph has captured."""

    def accumulate(self, batch: Batch, kl_weight: float | Tensor, *, share: float) -> Tensor:
        """Put the gradient of the NLL into ``.grad``; ``kl_weight`` and ``share`` (1: the whole batch) are not used.

        Returns:
            (3,) loss, NLL (the same number) and 0 in the place of the KL, nats per example.
        """
        loss = self.step.gradient(self.nll(batch))
        return torch.stack([loss, loss, torch.zeros_like(loss)])

    def finish(self) -> None:
        """Leave the gradient as it is."""


class NoUpdate:
    """An optimizer that changes nothing: the two updates of :class:`AlternatingStep` come after the gradient.

    Args:
        param_groups: Groups of the optimizer that makes the update.
    """

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = param_groups

    def step(self) -> None:
        """Change nothing."""


def gradient_step(
    step: AlternatingStep, nll: Callable[[Batch], Callable[[Tensor], Tensor]], *, device: torch.device, graphed: bool
) -> EagerStep[GradientObjective]:
    """A step that computes the gradient of the NLL of a batch, and updates nothing.

    Args:
        step: Puts the gradient into ``.grad``.
        nll: Maps a batch to its mean NLL as a function of s.
        device: Device of the first adapted layer.
        graphed: Replay the gradient as a CUDA graph.
    """
    objective = GradientObjective(step, nll)
    return (GraphedStep if graphed else EagerStep)(objective, NoUpdate(step.adamw.param_groups), device=device)


def _finite(name: str, value: Tensor) -> float:
    number = value.item()
    if not torch.isfinite(value):
        raise FloatingPointError(f"The {name} is {number}.")
    return number
