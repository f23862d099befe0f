"""The step of :mod:`scalabl_pyro.baselines.scalabl_released`: AdamW on the NLL, then SGD on the weighted KL.

On a GPU the gradient of the NLL, nearly all of the work, is replayed as a CUDA graph; the two updates are not.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..training.cuda_graphs import GraphReplay
from ..training.optimizer import set_rates


class Latents(Protocol):
    """q(s), with parameters of its own."""

    def parameters(self) -> Any:
        """What SGD moves."""

    def draw(self) -> Tensor:
        """(D,) one draw, reparametrized."""

    def kl(self) -> Tensor:
        """The divergence, nats."""


class AlternatingStep:
    """AdamW on the NLL, then SGD on the weighted KL.

    Args:
        latents: q(s).
        learned: A, B, heads, parameters of the task.
        lr: of AdamW.
        lr_kl: of SGD.
    """

    def __init__(self, latents: Latents, learned: Sequence[nn.Parameter], *, lr: float, lr_kl: float) -> None:
        self.latents = latents
        self.adamw = torch.optim.AdamW([*learned, *latents.parameters()], lr=lr, eps=1e-6, weight_decay=0.0)
        self.sgd = torch.optim.SGD(latents.parameters(), lr=lr_kl)

    def __call__(self, nll: Callable[[Tensor], Tensor], *, weight: float, rate: float) -> tuple[float, float]:
        """One step of both; the mean NLL before it and the KL between the two.

        Args:
            nll: mean NLL of a batch as a function of s.
            weight: pi_i.
            rate: factor of both learning rates.

        Raises:
            FloatingPointError: one of the two is not finite; the step that it belongs to was not made.
        """
        return self.update(self.gradient(nll), weight=weight, rate=rate)

    def gradient(self, nll: Callable[[Tensor], Tensor]) -> Tensor:
        """Put the gradient of the NLL into ``.grad``, in the memory where the last one lies; the NLL."""
        self.adamw.zero_grad(set_to_none=False)
        loss = nll(self.latents.draw())
        loss.backward()
        return loss.detach()

    def update(self, loss: Tensor, *, weight: float, rate: float) -> tuple[float, float]:
        """The step of AdamW with the gradient that is there, and that of SGD; see :meth:`__call__`."""
        set_rates(self.adamw, rate)
        set_rates(self.sgd, rate)
        value = _finite("NLL", loss)
        self.adamw.step()
        kl = self.latents.kl()
        _finite("KL", weight * kl)
        self.sgd.zero_grad(set_to_none=False)
        (weight * kl).backward()
        self.sgd.step()
        return value, kl.item()


class EagerGradient:
    """The gradient of the NLL of a batch, without an update.

    Args:
        step: puts it into ``.grad``.
        nll: batch -> mean NLL as a function of s.
        device: of the first adapted layer.
    """

    def __init__(
        self, step: AlternatingStep, nll: Callable[[Batch], Callable[[Tensor], Tensor]], *, device: torch.device
    ) -> None:
        self.step = step
        self.nll = nll
        self.device = device
        for group in step.adamw.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """The NLL; ``kl_weight`` plays no part."""
        return self.step.gradient(self.nll(batch.to(self.device)))


def graphed_gradient(eager: EagerGradient) -> GraphReplay:
    """Replay a gradient where it was captured. Gradients keep the memory that they have from the start."""
    return GraphReplay(eager, device=eager.device)


def _finite(name: str, value: Tensor) -> float:
    number = value.item()
    if not torch.isfinite(value):
        raise FloatingPointError(f"The {name} is {number}.")
    return number
