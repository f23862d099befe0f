"""One optimizer step: the gradient of a batch over micro-batches and processes, a check, an update, a check of that.

A step that is not finite changes no parameter. An update that leaves a parameter without a finite value is taken back.
Both checks stay on the device, so that a GPU need not wait for the host: a flag keeps the optimizer from updating from
that step on, until the host has read it.

Several processes take a step in two parts, with the sum of their gradients between them. Each part can be captured.
"""

from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._process.stop_signals import StopSignals
from ..data.batch import Batch
from ..distributed.processes import Processes
from ..distributed.shared_gradients import SharedGradients
from ..lora.hidden_state_cache import PrefixStore
from .gradient_check import GradientCheck
from .objective import StepObjective
from .optimizer import clip_gradients, parameters_of
from .update_check import UpdateCheck

Objective = TypeVar("Objective", bound=StepObjective)


class StepResult(NamedTuple):
    """What one step gives.

    Attributes:
        statistics: (5,) Loss, NLL, weighted KL (nats per example), gradient norm, and 0, or infinity if the
            update was taken back, on the device.
        signal: Largest signal that any of several processes has received, or 0. It is always 0 in a single process.
    """

    statistics: Tensor
    signal: int = 0


class EagerStep(Generic[Objective]):
    """Compute the gradient of the loss of one batch, and update if loss and gradient are finite.

    Args:
        objective: What is minimized.
        optimizer: A fused optimizer, which looks at ``found_inf`` before it updates.
        device: Device of the first adapted layer.
        micro_batch_size: Rows per forward pass.
        max_grad_norm: Largest global gradient norm.
        store: Hidden states below the first adapted block, if they are cached.
        processes: Processes that share each batch.
        signals: Signals that this process has received.
        check: Check that the gradient reaches every layer. It is active inside ``with step.check:`` only.
        update_check: Check of the parameters after each update; None for a step that makes no update.
        why_eager: Why steps are not captured; None if they are.

    Attributes:
        blocked: () 1.0 on the device after a step that was not finite, until the host sets it to 0.
        shared: The sum of the gradients over several processes; None in a single process.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Any,
        *,
        device: torch.device,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = None,
        store: PrefixStore | None = None,
        processes: Processes | None = None,
        signals: StopSignals | None = None,
        check: GradientCheck | None = None,
        update_check: UpdateCheck | None = None,
        why_eager: str | None = "steps are not captured",
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.max_grad_norm = max_grad_norm
        self.store = store
        self.processes = processes or Processes()
        several = self.processes.are_several
        self.shared = SharedGradients(parameters_of(optimizer), self.processes) if several else None
        self.signals = signals or StopSignals(terminate=False)
        self.check = check
        self.update_check = update_check
        self._why_eager = why_eager
        self.blocked = torch.zeros((), device=device, dtype=torch.float32)  # whatever the default dtype is
        # What a GradScaler sets on a fused optimizer: no update while ``found_inf`` is 1.
        optimizer.grad_scale, optimizer.found_inf = None, self.blocked

    @property
    def why_eager(self) -> str | None:
        """Why steps are not captured; None if they are."""
        return self._why_eager

    def __call__(self, batch: Batch, kl_weight: float | Tensor) -> StepResult:
        """Take one step.

        Args:
            batch: The rows of all processes.
            kl_weight: Weight of the KL.

        Returns:
            Statistics of the batch before the update.
        """
        terms = self.first_part(batch, kl_weight)
        signal = self.sum_over_processes(batch, terms)
        return StepResult(self.second_part(terms), signal)

    def first_part(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Compute the gradient of a batch; (3,) loss, NLL and weighted KL of the rows of this process."""
        terms = self.gradient(batch, kl_weight)
        if self.shared is not None:
            self.shared.pack(terms)
        return terms

    def sum_over_processes(self, batch: Batch, terms: Tensor) -> int:
        """Sum the gradients over processes, after all of them have said that they are there; the largest signal."""
        if self.shared is None:
            return 0
        signal = self.shared.agree(batch, self.signals.received or 0, terms)
        self.shared.reduce()
        return signal

    def second_part(self, terms: Tensor) -> Tensor:
        """Check the gradient in ``.grad``, and update; (5,) the statistics of the step."""
        if self.shared is not None:
            terms = self.shared.unpack().to(terms.dtype)
        self.objective.finish()
        if self.check is not None:
            self.check(terms[0])
        norm = clip_gradients(self.optimizer, self.max_grad_norm).to(terms)
        finite = torch.isfinite(terms[0]) & torch.isfinite(norm)
        self._block_unless(finite)
        return torch.cat([terms, norm.reshape(1), self._update().to(terms).reshape(1)])

    def _update(self) -> Tensor:
        """Update the parameters; () 0, or infinity if the update was taken back."""
        if self.update_check is None:
            self.optimizer.step()
            return torch.zeros_like(self.blocked)
        self.update_check.keep()
        self.optimizer.step()
        outcome = self.update_check.settle()
        if self.update_check.stays_on_device or outcome:
            self._block_unless(torch.isfinite(outcome))
        return outcome

    def _block_unless(self, finite: Tensor) -> None:
        self.blocked.copy_(torch.maximum(self.blocked, (~finite).to(self.blocked)))

    def gradient(self, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """Put the gradient of the loss of a batch into ``.grad``.

        Each micro-batch of b of the B rows gives the whole ELBO scaled to N, so its share is b / B. If several
        processes share the batch, each has a part of every micro-batch and computes its part of the sums.

        Returns:
            (3,) Loss, NLL and weighted KL, nats per example.
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
