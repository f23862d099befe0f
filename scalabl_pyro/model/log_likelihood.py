"""Log likelihood log p(y | s) of a whole data set with fixed factors and heads, for NUTS, Laplace and diagnostics."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .._errors import check_count
from ..data.batch import Batch, Example
from ..lora.forward import AdaptedLLM
from ..lora.hidden_state_cache import Prefix
from ..tasks import Task, at_least_float32
from .passes import Passes
from .provenance import run_with_provenance


class LogLikelihood:
    """The log likelihood of N examples as a function of s, in nats.

    Args:
        llm: LLM that computes with the factors of a posterior.
        task: Task that defines the likelihood.
        examples: Tokenized rows with answers.
        batch_size: Number of rows per forward pass.
        cache_prefix: Whether to keep the hidden states at the first adapted block for later passes. The blocks below it
            then run only once per batch. Ignored if ``adapter.has_fixed_prefix`` is False.

    Raises:
        ValueError: If ``batch_size`` is not a whole number from 1 on, or if a token has no embedding.

    Example:
        >>> likelihood = posterior.log_likelihood(train_data)
        >>> likelihood(posterior.mean())  # nats, differentiable in s
    """

    def __init__(
        self,
        llm: AdaptedLLM,
        task: Task,
        examples: Sequence[Example],
        *,
        batch_size: int = 16,
        cache_prefix: bool = False,
    ) -> None:
        passes = Passes.over(examples, task, llm.adapter, batch_size=batch_size)
        self.llm = llm
        self.task = task
        self.examples = examples
        self.num_data = len(examples)
        self.device = passes.device
        keep = cache_prefix and llm.adapter.has_fixed_prefix
        self.passes = Passes(
            llm.adapter,
            [batch.to(self.device) for batch in passes.batches],
            prefixes=[Prefix() for _ in passes.batches] if keep else None,
        )

    @torch.no_grad()
    def by_row(self, s: Tensor, *, draws_per_pass: int = 32, progress: bool = False) -> Tensor:
        """Compute the log likelihood of each example under each draw.

        Args:
            s: Draws, (S, D).
            draws_per_pass: Largest number of draws per forward pass.
            progress: Whether to show a progress bar.

        Returns:
            Log likelihoods in nats, (S, N), on the CPU.

        Raises:
            ValueError: If ``draws_per_pass`` is not a whole number from 1 on.
        """
        check_count(draws_per_pass=draws_per_pass)
        out = torch.empty(len(s), self.num_data, dtype=torch.promote_types(s.dtype, torch.float32))

        def fill(batch: Batch) -> None:
            for start in range(0, len(s), draws_per_pass):
                part = s[start : start + draws_per_pass].to(self.device)
                values = self._of_batch(batch, part.unsqueeze(1))
                out[start : start + draws_per_pass, batch.index.cpu()] = values.cpu().to(out.dtype)

        self.passes.map(fill, progress=progress, description="log likelihood")
        return out

    def with_gradient(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the sum over examples and its gradient with respect to s, with the memory of one batch.

        Args:
            s: Latents, (D,).

        Returns:
            Log likelihood in nats, (), and its gradient, (D,).
        """
        total, gradient = torch.zeros((), dtype=s.dtype), torch.zeros_like(s)

        def add(batch: Batch) -> None:
            point = s.detach().to(self.device).requires_grad_(True)
            value = self._of_batch(batch, point).sum()
            (slope,) = torch.autograd.grad(value, point)
            total.add_(value.detach().to(total))
            gradient.add_(slope.to(gradient))

        with torch.enable_grad():
            self.passes.map(add)
        return total, gradient

    def __call__(self, s: Tensor) -> Tensor:
        """Compute the sum over examples, in nats, at latents s (D,). The result is differentiable in s."""
        return run_with_provenance(lambda plain: _Sum.apply(plain, self.with_gradient), s)

    def with_own_s(self, batch: Batch, s: Tensor) -> tuple[Tensor, Tensor]:
        """Run a batch with one copy of s per row; call it inside ``passes.map``.

        Each row uses only its own copy of s. The gradient of a sum over rows then contains the gradient of each row.

        Args:
            batch: Batch of B rows on the device.
            s: Latents, (D,).

        Returns:
            Copies of s, (B, D), which require a gradient, and outputs, (B, K).
        """
        with torch.enable_grad():
            own = s.detach().to(self.device).expand(len(batch), -1).clone().requires_grad_(True)
            return own, self.task.outputs(self.llm, batch, own).reshape(len(batch), -1)

    def _of_batch(self, batch: Batch, s: Tensor) -> Tensor:
        d = self.task.distribution(self.task.outputs(self.llm, batch, s), batch)
        return at_least_float32(d.log_prob(cast(Tensor, batch.target)))


class _Sum(torch.autograd.Function):
    """Sum over batches whose gradient is computed in the forward pass, together with its value."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, with_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = with_gradient(s)
        ctx.save_for_backward(gradient)
        return value.to(s.device)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return outputs[0] * gradient, None
