"""Generate from the mixture of draws: one text at a time, whose next token all draws choose together.

The weights of the draws follow from the tokens written so far, see ``token_readout``. The LLM runs each row once per
draw inside, and gives the logarithm of the mixture for its logits. To ``generate`` of transformers it looks like one
plain model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..lora.adapter import Adapter
from ..lora.shared_prefix import repeat_rows
from .token_readout import log_mixture, log_probs_by_draw


class MixtureReadout:
    """Readout of log p(next token) under the mixture, (rows, 1, vocabulary), from S draws of each row.

    Args:
        num_draws: Number S of draws.
    """

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self._log_weights: Tensor | None = None  # (S, rows)
        self._log_p: Tensor | None = None  # (S, rows, vocabulary)

    def read_tokens(self, tokens: Tensor) -> None:
        """Update the weights by the tokens (rows,) that were chosen after the last pass."""
        if self._log_p is None or self._log_weights is None:
            return
        index = tokens.to(self._log_p.device).expand(self.num_draws, -1).unsqueeze(-1)
        self._log_weights = self._log_weights + self._log_p.gather(-1, index)[..., 0]

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Return the logarithm of the mixture at the last token."""
        self._log_p = log_probs_by_draw(head(hidden[:, -1:])[:, 0], self.num_draws)
        if self._log_weights is None:
            self._log_weights = self._log_p.new_zeros(self._log_p.shape[:2])
        return log_mixture(self._log_p, self._log_weights.log_softmax(0)).unsqueeze(1)

    def repeat(self, batch_shape: torch.Size, rows: int) -> "MixtureReadout":
        """Return the readout itself: it has no tensors with one entry per row of the input."""
        return self


@contextmanager
def decode_mixture(adapter: Adapter, s: Tensor, num_rows: int, **bound: Any) -> Iterator[None]:
    """Let the module return the mixture of draws as logits inside the context.

    Args:
        adapter: Adapter inside the module.
        s: Draws, (S, D).
        num_rows: Number of rows of the input.
        bound: Factors and heads of the posterior.
    """
    readout = MixtureReadout(len(s))
    shape = torch.Size((len(s), num_rows))

    def repeat(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        readout.read_tokens(kwargs["input_ids"][:, -1])
        return args, repeat_rows(kwargs, shape, num_rows, min_dim=2)

    hook = adapter.module.register_forward_pre_hook(repeat, with_kwargs=True)
    try:
        with adapter.bind(s.repeat_interleave(num_rows, 0), readout=readout, **bound):
            yield
    finally:
        hook.remove()
