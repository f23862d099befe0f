"""Log probabilities of given tokens, computed at the output head in parts.

A sequence of T tokens needs one number per token, and the logits need one per token and word of the vocabulary: a
thousand times as much as everything else. Here the head runs on a few tokens at a time. The backward pass runs each
part again, so that it never holds the logits of more than one part.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .binding import Readout
from .gradient_checkpointing import RunAgain
from .shared_prefix import repeat_rows

#: Marks a place without a token, as in Hugging Face models.
NO_TOKEN = -100
#: Largest number of logits of one part: 128 MiB in float32.
MAX_LOGITS = 2**25


@dataclass(frozen=True)
class TokenLogProbs:
    """Readout of log p(token) for one given token per position, in nats, (rows, T, 1).

    Attributes:
        tokens: The tokens, (rows, T); ``NO_TOKEN`` where a row has fewer, which gives 0.
        has_dropout: Whether the head uses dropout; the backward pass then draws the same masks.
        max_logits: Largest number of logits of one part.

    Example:
        >>> readout = TokenLogProbs(tokens)  # (rows, T)
        >>> llm(input_ids=ids, s=s, positions=positions, readout=readout).logits[..., 0]  # (rows, T), nats
    """

    tokens: Tensor
    has_dropout: bool = False
    max_logits: int = MAX_LOGITS

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Compute the log probabilities, (rows, T, 1), in float32 or higher."""

        def part(hidden: Tensor, tokens: Tensor) -> Tensor:
            return log_probs_of(head(hidden), tokens)

        tokens = self.tokens.to(hidden.device)
        one, count = hidden[:, :1], tokens.shape[1]
        with torch.no_grad():
            vocabulary = head(one).shape[-1] if count > 1 else 1
        size = max(self.max_logits // (len(hidden) * vocabulary), 1)
        if size >= count:
            return part(hidden, tokens).unsqueeze(-1)
        run = RunAgain(part, self.has_dropout) if torch.is_grad_enabled() else part
        starts = range(0, count, size)
        parts = [run(hidden[:, i : i + size], tokens[:, i : i + size]) for i in starts]
        return torch.cat(parts, dim=1).unsqueeze(-1)

    def repeat(self, batch_shape: torch.Size, rows: int) -> Readout:
        """Return the readout for rows that are repeated for each draw."""
        return replace(self, tokens=repeat_rows(self.tokens, batch_shape, rows))


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log probability of each token, in float32 or higher.

    Args:
        logits: (..., T, vocabulary).
        tokens: (..., T); ``NO_TOKEN`` gives 0.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = tokens.expand(logits.shape[:-1])
    flat = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), ignore_index=NO_TOKEN, reduction="none")
    return -flat.view(tokens.shape)
