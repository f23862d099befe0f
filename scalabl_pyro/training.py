"""One optimiser step after another: the gradient of the loss, a check, an update, a line of history.

A step that is not finite changes no parameter. The check stays on the device, so that a GPU need not wait for the
host: a flag keeps the optimiser from updating from that step on, until the host has read it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .data import Batch
from .objective import Objective
from .optimiser import clip_gradients, set_rates
from .prefix import PrefixStore
from .stein import SteinObjective

Callback = Callable[[dict[str, float]], bool | None]


class EagerStep:
    """Gradient of the loss of one batch, and an update if loss and gradient are finite.

    Args:
        objective: what is minimised.
        optimiser: a fused one, which looks at ``found_inf`` before it updates.
        micro_batch_size: rows a forward pass.
        max_grad_norm: the global gradient norm is clipped at it.
        device: of the first adapted layer.
        store: hidden states below the first adapted block, where they are kept.
    """

    def __init__(
        self,
        objective: Objective | SteinObjective,
        optimiser: Any,
        *,
        device: torch.device,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = None,
        store: PrefixStore | None = None,
    ) -> None:
        self.objective = objective
        self.optimiser = optimiser
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.store = store
        self.blocked = torch.zeros((), device=device)
        # What a GradScaler sets on a fused optimiser: no update while ``found_inf`` is 1.
        optimiser.grad_scale, optimiser.found_inf = None, self.blocked

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Loss, NLL, weighted KL (nats per example) and gradient norm of the step, (4,) on the device."""
        terms = self.gradient(batch, kl_weight)
        norm = clip_gradients(self.optimiser, self.max_grad_norm).to(terms)
        finite = torch.isfinite(terms[0]) & torch.isfinite(norm)
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked)))
        self.optimiser.step()
        return torch.cat([terms, norm.reshape(1)])

    def gradient(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Put the gradient of the loss of a batch into ``.grad``; loss, NLL and weighted KL, (3,).

        Each micro-batch of b of the B rows gives the whole ELBO scaled to N, so its share is b / B.
        """
        self.objective.zero_grad(set_to_none=True)
        parts = []
        for micro in batch.split(self.micro_batch_size or len(batch)):
            share = len(micro) / len(batch)
            width = micro.inputs["input_ids"].shape[1] if self.store else 0
            with self.store.reuse(micro.index, micro.last + 1, width) if self.store else nullcontext():
                parts.append(share * self.objective.accumulate(micro.to(self.device), kl_weight, share=share))
        self.objective.finish()
        return torch.stack(parts).sum(0)


class Pending(NamedTuple):
    """A step whose figures the host has not read yet."""

    step: int
    batch: Batch
    kl_weight: float
    rate: float
    seconds: float
    figures: Tensor


class Trainer:
    """Steps, and what is known of them.

    Args:
        execute: one step, see :class:`EagerStep`.
        batches: step -> batch.
        kl_weight: step -> weight of the KL.
        rate: step -> factor of the learning rates.
        lr: learning rate of the factors, for the history.
        num_data: N.
        read_every: steps after which the host reads the figures; on a GPU each reading waits for it.

    Attributes:
        history: a row for each step that was read.
    """

    def __init__(
        self,
        execute: EagerStep,
        *,
        batches: Callable[[int], Batch],
        kl_weight: Callable[[int], float],
        rate: Callable[[int], float],
        lr: float,
        num_data: int,
        read_every: int = 1,
    ) -> None:
        self.execute = execute
        self.batches = batches
        self.kl_weight = kl_weight
        self.rate = rate
        self.lr = lr
        self.num_data = num_data
        self.read_every = read_every
        self.history: list[dict[str, float]] = []
        self._pending: list[Pending] = []
        self._start = time.perf_counter()

    def run(self, steps: Sequence[int]) -> Iterator[dict[str, float]]:
        """Go through ``steps`` and yield their history rows, in order, as they are read.

        Raises:
            FloatingPointError: a loss or gradient that is not finite, with the reason; no parameter was changed by it
                or since.
        """
        for step in steps:
            batch, weight, rate = self.batches(step), self.kl_weight(step), self.rate(step)
            set_rates(self.execute.optimiser, rate)
            with pyro.validation_enabled(step == steps[0]):
                figures = self.execute(batch, weight)
            now = time.perf_counter() - self._start
            self._pending.append(Pending(step, batch, weight, rate * self.lr, now, figures))
            if len(self._pending) >= self.read_every or step == steps[-1]:
                yield from self.read()

    def read(self) -> Iterator[dict[str, float]]:
        """Rows of the steps since the last reading."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        figures = torch.stack([p.figures for p in pending]).tolist()
        for one, (loss, nll, divergence, norm) in zip(pending, figures, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(self._reason(one, loss))
            row = {
                "step": one.step,
                "loss": loss,
                "nll": nll,
                "kl": divergence * self.num_data / one.kl_weight if one.kl_weight else float("nan"),
                "kl_weight": one.kl_weight,
                "grad_norm": norm,
                "lr": one.rate,
                "seconds": one.seconds,
            }
            self.history.append(row)
            yield row

    def _reason(self, one: Pending, loss: float) -> str:
        kept = "Parameters keep their values from before this step."
        if math.isfinite(loss):
            return (
                f"At step {one.step}: the loss is finite, but its gradient is not. {kept} Lower the learning rates, or "
                "use bfloat16 instead of float16."
            )
        where = self.execute.objective.explain(one.batch.to(self.execute.device))
        return (
            f"At step {one.step}: the loss is {loss}: {where}. {kept} Lower the learning rates, set max_grad_norm, or "
            "check these examples."
        )
