"""What every draw says of given tokens, and how far the draws disagree, computed at the output head in parts.

The next token of the mixture of K draws is p(y_t | y_<t) = sum_k w_k p_k(y_t | y_<t). The weight of a draw is what the
tokens before say of it: w_k is proportional to prod_{j<t} p_k(y_j | y_<j). Equal weights would draw s again at every
token, and their sums over tokens are biased.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lora.outputs import at_least_float32
from ..lora.token_log_probs import MAX_LOGITS, NO_TOKEN, parts_behind

#: Numbers per token before those of the most probable tokens: log p under each draw and under the mixture, and the
#: entropies of the mixture and of the draws.
FIXED = 4


@dataclass(frozen=True)
class TokenReadout:
    """Readout of one row under all draws: log probabilities, entropies and the most probable tokens.

    The rows of the pass are S draws of each of B rows, ordered by draw, then by row.

    Attributes:
        tokens: The given tokens, (B, T) before :meth:`repeat`; ``NO_TOKEN`` where a row has fewer.
        num_draws: Number S of draws.
        top: Number of most probable tokens to keep.
        max_logits: Largest number of logits of one part.
    """

    tokens: Tensor
    num_draws: int
    top: int = 0
    max_logits: int = MAX_LOGITS

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Compute the numbers of each token, (S * B, T, 4 + 3 * top), in float32 or higher.

        They are log p(token) under the draw of the row, log p(token) under the mixture, the entropy of the mixture, the
        mean entropy of the draws, and then the indices of the most probable tokens of the mixture, their probabilities
        in the mixture, and their probabilities under the draw of the row. All logarithms are natural.
        """
        tokens = self.tokens.to(hidden.device)
        logits = head(hidden[:, :1])
        vocabulary = logits.shape[-1]
        if self.top > vocabulary:
            raise ValueError(f"top={self.top} is larger than the vocabulary, which has {vocabulary} tokens.")
        start = logits.new_zeros(self.num_draws, len(hidden) // self.num_draws)
        part, log_weights = self._part(logits, tokens[:, :1], at_least_float32(start))
        parts = [part]
        for here in parts_behind(logits, tokens.shape[1], self.max_logits):
            part, log_weights = self._part(head(hidden[:, here]), tokens[:, here], log_weights)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def repeat(self, batch_shape: torch.Size, rows: int) -> "TokenReadout":
        """Return the readout for rows that are repeated for each draw: the tokens are the same for all of them."""
        if batch_shape.numel() != self.num_draws * rows:
            raise ValueError(f"The pass has {batch_shape.numel()} rows, and {self.num_draws} draws of {rows} rows.")
        return replace(self)

    def _part(self, logits: Tensor, tokens: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the numbers of some tokens; return them and the weights (S, B) of the draws behind them."""
        log_p = log_probs_by_draw(logits, self.num_draws)  # (S, B, T, V)
        is_token = tokens != NO_TOKEN
        index = tokens.where(is_token, 0).expand(log_p.shape[:-1]).unsqueeze(-1)
        own = log_p.gather(-1, index)[..., 0].where(is_token, 0.0)  # (S, B, T)
        summed = torch.cat([log_weights.unsqueeze(-1), own], dim=-1).cumsum(-1)  # no difference: it could be inf - inf
        log_w = summed[..., :-1].log_softmax(0)
        mixture = log_mixture(log_p, log_w)  # (B, T, V)
        total = entropy(mixture)
        aleatoric = (log_w.exp() * entropy(log_p)).sum(0)
        token = torch.logsumexp(log_w + own, dim=0).where(is_token, 0.0)
        columns = [own, *(x.where(is_token, 0.0).expand_as(own) for x in (token, total, aleatoric))]
        numbers = torch.stack(columns, dim=-1)
        if self.top:
            best, ids = mixture.topk(self.top, dim=-1)
            shape = (*own.shape, self.top)
            by_draw = log_p.gather(-1, ids.expand(shape))
            numbers = torch.cat([numbers, ids.to(numbers).expand(shape), best.exp().expand(shape), by_draw.exp()], -1)
        return numbers.flatten(0, 1), summed[..., -1]


def log_probs_by_draw(logits: Tensor, num_draws: int) -> Tensor:
    """Return log probabilities (S, B, ..., V) of the logits (S * B, ..., V), in float32 or higher."""
    return at_least_float32(logits).log_softmax(-1).unflatten(0, (num_draws, -1))


def log_mixture(log_p: Tensor, log_weights: Tensor) -> Tensor:
    """Return the log probabilities (..., V) of the mixture of S draws.

    Args:
        log_p: Log probabilities of each draw, (S, ..., V).
        log_weights: Logarithms of weights that add up to 1, (S, ...).
    """
    return torch.logsumexp(log_weights.unsqueeze(-1) + log_p, dim=0)


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy of categorical distributions, nats, from their log probabilities (..., V)."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
