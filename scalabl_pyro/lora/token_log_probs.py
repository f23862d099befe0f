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
from .outputs import at_least_float32
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
        logits = head(hidden[:, :1])
        rest = parts_behind(logits, tokens.shape[1], self.max_logits)
        run = RunAgain(part, self.has_dropout) if torch.is_grad_enabled() and len(rest) > 1 else part
        parts = [log_probs_of(logits, tokens[:, :1]), *(run(hidden[:, here], tokens[:, here]) for here in rest)]
        return torch.cat(parts, dim=1).unsqueeze(-1)

    def repeat(self, batch_shape: torch.Size, rows: int) -> Readout:
        """Return the readout for rows that are repeated for each draw."""
        return replace(self, tokens=repeat_rows(self.tokens, batch_shape, rows))


def parts_behind(logits: Tensor, count: int, max_logits: int) -> list[slice]:
    """Divide the tokens behind the first one into parts.

    Args:
        logits: Logits of the first token, (rows, 1, vocabulary).
        count: Number of tokens.
        max_logits: Largest number of logits of one part.
    """
    size = max(max_logits // logits.numel(), 1)
    return [slice(start, start + size) for start in range(1, count, size)]


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log probability of each token, in float32 or higher.

    Args:
        logits: (..., T, vocabulary).
        tokens: (..., T); ``NO_TOKEN`` gives 0.
    """
    logits = at_least_float32(logits)
    tokens = tokens.expand(logits.shape[:-1])
    flat = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), ignore_index=NO_TOKEN, reduction="none")
    return -flat.view(tokens.shape)
