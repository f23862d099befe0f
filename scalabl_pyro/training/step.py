"""One optimizer step: the gradient of a batch over micro-batches and processes, a check, an update.

A step that is not finite changes no parameter. The check stays on the device, so that a GPU need not wait for the
host: a flag keeps the optimizer from updating from that step on, until the host has read it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..distributed.processes import Processes
from ..lora.hidden_state_cache import PrefixStore
from .objective import Objective
from .optimizer import clip_gradients, parameters_of
from .svgd import SteinObjective


class EagerStep:
    """Gradient of the loss of one batch, and an update if loss and gradient are finite.

    Args:
        objective: what is minimized.
        optimizer: a fused one, which looks at ``found_inf`` before it updates.
        micro_batch_size: rows a forward pass.
        max_grad_norm: the global gradient norm is clipped at it.
        device: of the first adapted layer.
        store: hidden states below the first adapted block, where they are kept.
        processes: that share each batch.

    Attributes:
        check: looks at the gradient before the update.
        signal: gives the signal that this process has received, or 0.
        agreed_signal: the largest one of all processes, as of the last step.
    """

    def __init__(
        self,
        objective: Objective | SteinObjective,
        optimizer: Any,
        *,
        device: torch.device,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = None,
        store: PrefixStore | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.store = store
        self.processes = processes or Processes()
        self.blocked = torch.zeros((), device=device, dtype=torch.float32)  # whatever the default
        # What a GradScaler sets on a fused optimizer: no update while ``found_inf`` is 1.
        optimizer.grad_scale, optimizer.found_inf = None, self.blocked
        self.check: Callable[[Tensor], None] | None = None
        self.signal: Callable[[], int] = lambda: 0
        self.agreed_signal = 0

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Loss, NLL, weighted KL (nats per example) and gradient norm of the step, (4,) on the device."""
        terms = self.gradient(batch, kl_weight)
        if self.processes.are_several:
            self.agreed_signal = self.processes.synchronize(batch, self.signal())
            terms = self.processes.all_reduce_gradients(parameters_of(self.optimizer), terms)
        self.objective.finish()
        if self.check is not None:
            self.check(terms[0])
        norm = clip_gradients(self.optimizer, self.max_grad_norm).to(terms)
        finite = torch.isfinite(terms[0]) & torch.isfinite(norm)
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked)))
        self.optimizer.step()
        return torch.cat([terms, norm.reshape(1)])

    def gradient(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Put the gradient of the loss of a batch into ``.grad``; loss, NLL and weighted KL, (3,).

        Each micro-batch of b of the B rows gives the whole ELBO scaled to N, so its share is b / B. Of several
        processes each has a part of every micro-batch, and what it computes is its part of the sums.
        """
        self.objective.zero_grad(set_to_none=True)
        parts = []
        for joint in batch.split((self.micro_batch_size or len(batch)) * self.processes.size):
            micro, share = self.processes.shard(joint)
            share *= len(joint) / len(batch)
            width = micro.inputs["input_ids"].shape[1] if self.store else 0
            with self.store.reuse(micro.index, micro.last + 1, width) if self.store else nullcontext():
                parts.append(share * self.objective.accumulate(micro.to(self.device), kl_weight, share=share))
        return torch.stack(parts).sum(0)
