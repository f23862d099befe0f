"""Log probabilities of continuations under each draw, for continuations that share their input.

Two requests that differ in the last token alone have the same input: context and continuation without its last token.
The LLM runs this input once for both. A request may also begin its continuation later than another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...lora.binding import Readout
from ...lora.forward import AdaptedLLM
from ...lora.head_check import ends_with_head
from ...lora.look_ahead import looks_ahead
from ...lora.outputs import at_least_float32
from ...lora.token_log_probs import MAX_LOGITS, NO_TOKEN, parts_behind
from ...prediction.token_readout import log_mixture, log_probs_by_draw

#: Numbers per token and continuation: log p(token) under the draw, and whether the mixture would choose the token.
COLUMNS = 2


@dataclass(frozen=True)
class Scored:
    """What the draws say of one continuation.

    Attributes:
        log_probs: (S,) log probability of the whole continuation under each draw, nats, float64.
        is_greedy: Whether each of its tokens is the most probable one of the mixture, given the tokens before it.
    """

    log_probs: np.ndarray
    is_greedy: bool


@dataclass(frozen=True)
class ContinuationReadout:
    """Readout of G continuations of each of B rows, under S draws.

    The mixture weights each draw by what the tokens of the continuation say of it: equally at its first token.

    Attributes:
        tokens: Continuations, (G, B, T); ``NO_TOKEN`` where a continuation has no token.
        num_draws: Number S of draws.
        dtype: Type of the softmax; None for that of the logits, and at least float32.
        max_logits: Largest number of logits of one part.
    """

    tokens: Tensor
    num_draws: int
    dtype: torch.dtype | None = None
    max_logits: int = MAX_LOGITS

    def __call__(self, head: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Compute the numbers of each token, (S * B, T, COLUMNS * G)."""
        tokens = self.tokens.to(hidden.device)
        logits = head(hidden[:, :1])
        groups, rows = tokens.shape[:2]
        log_weights = at_least_float32(logits.new_zeros(1)).new_zeros(groups, self.num_draws, rows, dtype=self.dtype)
        part, log_weights = self._part(logits, tokens[..., :1], log_weights)
        parts = [part]
        for here in parts_behind(logits, tokens.shape[2], self.max_logits):
            part, log_weights = self._part(head(hidden[:, here]), tokens[..., here], log_weights)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def repeat(self, batch_shape: torch.Size, rows: int) -> "ContinuationReadout":
        """Return the readout itself: the continuations are the same for all draws."""
        return self

    def _part(self, logits: Tensor, tokens: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the numbers of some tokens; return them and the weights (G, S, B) of the draws behind them."""
        log_p = log_probs_by_draw(logits if self.dtype is None else logits.to(self.dtype), self.num_draws)
        columns, weights = [], []
        for given, before in zip(tokens, log_weights, strict=True):  # (B, T), (S, B)
            is_token = given != NO_TOKEN
            index = given.where(is_token, 0).expand(log_p.shape[:-1]).unsqueeze(-1)
            own = log_p.gather(-1, index)[..., 0].where(is_token, 0.0)  # (S, B, T)
            summed = torch.cat([before.unsqueeze(-1), own], dim=-1).cumsum(-1)
            best = log_mixture(log_p, summed[..., :-1].log_softmax(0)).argmax(-1)  # (B, T)
            columns += [own, ((best == given) | ~is_token).to(own).expand_as(own)]
            weights.append(summed[..., -1])
        return torch.stack(columns, dim=-1).flatten(0, 1), torch.stack(weights)


def score_rows(
    llm: AdaptedLLM,
    s: Tensor,
    rows: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    dtype: torch.dtype | None = None,
) -> list[list[Scored]]:
    """Score the continuations of each row in one pass of all draws.

    Args:
        llm: LLM with the factors of the posterior. It is in eval mode.
        s: Draws, (S, D).
        rows: Inputs of B rows: context and continuation without its last token.
        continuations: Continuations of each row. The last token of each one is predicted at the last place of the row.
        dtype: Type of the softmax; None for that of the logits, and at least float32.

    Returns:
        What the draws say of each continuation of each row.

    Raises:
        ValueError: The LLM looks ahead: a token would be predicted from itself.
        FloatingPointError: A log probability is NaN.
    """
    device = llm.adapter.device
    width, longest = max(map(len, rows)), max(len(one) for row in continuations for one in row)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    tokens = torch.full((max(map(len, continuations)), len(rows), longest), NO_TOKEN)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    for b, (row, given) in enumerate(zip(rows, continuations, strict=True)):
        count = max(map(len, given))
        positions[b, :count] = torch.arange(len(row) - count, len(row))
        for g, one in enumerate(given):
            tokens[g, b, count - len(one) : count] = torch.tensor(one)
    readout = ContinuationReadout(tokens.to(device), len(s), dtype)
    numbers = _read(llm, ids, s.to(device).unsqueeze(1), positions.to(device), readout)
    by_row = numbers.unflatten(-1, (-1, COLUMNS)).double().cpu().numpy()  # (S, B, T, G, COLUMNS)
    if np.isnan(by_row).any():
        raise FloatingPointError("The log probability of a token is NaN: the outputs of the LLM overflow.")
    return [
        [Scored(by_row[:, b, :, g, 0].sum(-1), bool(by_row[0, b, :, g, 1].all())) for g in range(len(given))]
        for b, given in enumerate(continuations)
    ]


def _read(llm: AdaptedLLM, ids: Tensor, s: Tensor, positions: Tensor, readout: Readout) -> Tensor:
    """Return the numbers of the readout, (S, B, T, C)."""
    module = llm.adapter.module
    if looks_ahead(module, ids):
        raise ValueError(
            f"{type(module).__name__} looks ahead: a token would be predicted from itself. Load a causal LM."
        )
    inputs: dict[str, Any] = {"input_ids": ids, "s": s, "positions": positions}
    if ends_with_head(llm.adapter, {"input_ids": ids}):
        return cast(Tensor, llm(**inputs, readout=readout).logits)
    logits = llm(**inputs).logits
    batch = logits.shape[:-2]
    return readout.repeat(batch, len(ids))(lambda given: given, logits.flatten(0, -3)).unflatten(0, batch)
