"""log p(y | s) of a whole data set with the point estimates held fixed: what NUTS, Laplace and diagnostics need."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._process.lock import LOCK
from ..data.batch import Batch, Example, evaluation_batches
from ..data.encoding import check_tokens
from ..lora.forward import AdaptedLLM
from ..lora.hidden_state_cache import Prefix, reuse
from ..lora.train_mode import eval_mode
from ..tasks import Task, at_least_float32


class LogLikelihood:
    """The log likelihood of N examples as a function of s.

    Args:
        llm: the LLM with the factors of a posterior.
        task: the likelihood.
        examples: tokenized rows with answers.
        batch_size: rows a pass.
        cache_prefix: keep what the blocks below the first adapted one give, for all later passes.
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
        check_tokens(examples, llm.llm, task.pad_token_id)
        self.llm = llm
        self.task = task
        self.examples = examples
        self.num_data = len(examples)
        self.device = llm.adapter.device
        self.batches = [b.to(self.device) for b in evaluation_batches(examples, batch_size, task.pad_token_id)]
        keep = cache_prefix and llm.adapter.has_fixed_prefix
        self.prefixes = [Prefix() if keep else None for _ in self.batches]

    @torch.no_grad()
    def by_row(self, s: Tensor, *, draws_per_pass: int = 32, progress: bool = False) -> Tensor:
        """(S, N) log likelihood of each example under each of the draws ``s`` (S, D), on the CPU."""
        out = torch.empty(len(s), self.num_data, dtype=torch.promote_types(s.dtype, torch.float32))
        with eval_mode(self.llm.llm):
            for batch, prefix in tqdm(self._passes(), disable=not progress, desc="log likelihood"):
                for start in range(0, len(s), draws_per_pass):
                    part = s[start : start + draws_per_pass].to(self.device)
                    values = self._batch(batch, prefix, part.unsqueeze(1))
                    out[start : start + draws_per_pass, batch.index.cpu()] = values.cpu().to(out.dtype)
        return out

    def with_gradient(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over examples at one s (D,), and its gradient (D,); memory is that of one batch."""
        total, gradient = torch.zeros((), dtype=s.dtype), torch.zeros_like(s)
        with eval_mode(self.llm.llm), torch.enable_grad():
            for batch, prefix in self._passes():
                point = s.detach().to(self.device).requires_grad_(True)
                value = self._batch(batch, prefix, point).sum()
                (slope,) = torch.autograd.grad(value, point)
                total += value.detach().to(total)
                gradient += slope.to(gradient)
        return total, gradient

    def __call__(self, s: Tensor) -> Tensor:
        """The sum over examples at one s (D,), differentiable with respect to s."""
        return _Sum.apply(s, self.with_gradient)

    def rows_with_own_s(self, s: Tensor) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """For each batch: the batch, an s for each of its rows (B, D) that requires a gradient, and the outputs (B, K).

        Since row b sees its own copy of s, the gradient of a sum over rows holds every per-example gradient.
        """
        for batch, prefix in self._passes():
            # No scope stays open over a yield: an abandoned generator closes late, and would change the caller's modes.
            with eval_mode(self.llm.llm), torch.enable_grad(), reuse(self.llm.adapter, prefix):
                own = s.detach().to(self.device).expand(len(batch), -1).clone().requires_grad_(True)
                outputs = self.task.outputs(self.llm, batch, own).reshape(len(batch), -1)
            yield batch, own, outputs

    def _passes(self) -> list[tuple[Batch, Prefix | None]]:
        """The batches, each with its kept prefix."""
        return list(zip(self.batches, self.prefixes, strict=True))

    def _batch(self, batch: Batch, prefix: Prefix | None, s: Tensor) -> Tensor:
        with reuse(self.llm.adapter, prefix):
            outputs = self.task.outputs(self.llm, batch, s)
        with LOCK:
            d = self.task.likelihood(outputs, batch)
        return at_least_float32(d.log_prob(cast(Tensor, batch.target)))


class _Sum(torch.autograd.Function):
    """A sum whose gradient was computed batch by batch together with its value."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, with_gradient: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = with_gradient(s)
        ctx.save_for_backward(gradient)
        return value.to(s.device)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return outputs[0] * gradient, None
