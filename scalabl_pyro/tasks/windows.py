r"""Texts that are longer than the model can read: windows, and how their outputs become one output per row.

A row of t tokens is read as windows of L tokens, of which the last one may be shorter. A row of a batch holds its
windows one behind the other, so the number of a row's windows is ceil(t / L), and no other record of them is needed.

Each window has a weight w, its share of the row's tokens. ``"logits"`` makes the mean of the outputs,

.. math:: f(x, s) = \sum_w w f(x_w, s),

so that the likelihood is that of f. For classes, this is the normalized weighted geometric mean of the windows'
probabilities (a product of experts; Hinton, 2002). ``"probs"`` makes the mean of the probabilities,

.. math:: p(y | x, s) = \sum_w w \, p(y | x_w, s),

a mixture, in which a window counts for its share, however sure it is. Under "logits", a sure window counts for more.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import check_choice
from .._values import integer
from ..data.batch import Batch

#: Numbers of tokens from here on mean that a tokenizer does not know the length of a text that its model reads.
UNLIMITED = 10**9
#: How the outputs of windows are combined.
Rule = Literal["logits", "probs"]


def check_windows(windows: Any, overlap: Any, max_length: int | None, *, can_mix: bool, has_pair: bool) -> int:
    """Check the options of a task that reads windows.

    Args:
        windows: The rule, or None for no windows.
        overlap: Number of tokens that a window shares with the one before it.
        max_length: Number of tokens of a window.
        can_mix: Whether the task knows the rule ``"probs"``.
        has_pair: Whether the task reads a pair of texts.

    Returns:
        The overlap as a number.

    Raises:
        ValueError: An option is wrong, missing or without effect.
    """
    size = integer(overlap)
    if size is None or size < 0:
        raise ValueError(f"overlap={overlap!r} must be a whole number of tokens, 0 or more.")
    if windows is None:
        if size:
            raise ValueError(f"overlap={overlap!r} has no effect without windows: pass windows='logits' too.")
        return 0
    check_choice("windows", windows, ("logits", "probs"))
    if max_length is None:
        raise ValueError(
            f"windows={windows!r} needs max_length=, the number of tokens of a window, because this tokenizer does not "
            "say how many tokens its model reads."
        )
    if size >= max_length:
        raise ValueError(f"overlap={overlap!r} must be smaller than max_length={max_length}, the tokens of a window.")
    if has_pair:
        raise ValueError("windows= reads one text, and text_pair= names a second one: leave one of them out.")
    if windows == "probs" and not can_mix:
        raise ValueError("windows='probs' needs one class per row: use windows='logits'.")
    return size


def context_of(tokenizer: Any) -> int | None:
    """Return the number of tokens that the model of a tokenizer reads, as the tokenizer says; None if it does not."""
    found = integer(getattr(tokenizer, "model_max_length", None))
    return None if found is None or not 0 < found < UNLIMITED else found


def windows_of(tokenizer: Any, text: str, max_length: int, overlap: int) -> dict[str, list[int]]:
    """Tokenize a text as windows, one behind the other.

    Args:
        tokenizer: A fast tokenizer.
        text: The text.
        max_length: Number of tokens of a window, with its special tokens.
        overlap: Number of tokens that a window shares with the one before it.

    Returns:
        Lists of one length, by the name of the model's argument.

    Raises:
        ValueError: The tokenizer cannot make windows, or its special tokens leave no room for new tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"windows= needs a fast tokenizer, and {type(tokenizer).__name__} is a slow one.")
    room = max_length - tokenizer.num_special_tokens_to_add()
    if overlap >= room:
        raise ValueError(
            f"max_length={max_length} leaves {room} tokens of a window for the text, which must be more than "
            f"overlap={overlap}: increase max_length."
        )
    found = tokenizer(text, truncation=True, max_length=max_length, stride=overlap, return_overflowing_tokens=True)
    if wrong := [len(ids) for ids in found["input_ids"][:-1] if len(ids) != max_length]:
        raise ValueError(
            f"{type(tokenizer).__name__} made a window of {wrong[0]} tokens instead of {max_length}: leave windows out."
        )
    left_out = ("attention_mask", "overflow_to_sample_mapping")
    return {name: [*chain(*parts)] for name, parts in found.items() if name not in left_out}


def split_windows(batch: Batch, size: int, pad_token_id: int) -> tuple[Batch, Tensor]:
    """Make a row of each window.

    Args:
        batch: B rows.
        size: Number L of tokens of a window.
        pad_token_id: Token behind the end of a row.

    Returns:
        Batch of B * W rows, where W is the number of windows of the longest row, and the number of tokens of each
        window, (B, W). Windows behind the end of a row hold padding and have 0 tokens.
    """
    inputs = {
        name: in_windows(value, size, pad_token_id if name == "input_ids" else 0)
        for name, value in batch.inputs.items()
    }
    count = len(inputs["input_ids"]) // len(batch)
    begins = torch.arange(count, device=batch.last.device) * size
    lengths = (batch.last.unsqueeze(1) + 1 - begins).clamp(0, size)
    if "attention_mask" in inputs:  # attention to no token at all would be NaN
        inputs["attention_mask"] = inputs["attention_mask"].index_fill(1, begins[:1], 1)
    rows = replace(
        batch,
        inputs=inputs,
        index=batch.index.repeat_interleave(count),
        last=(lengths - 1).clamp(min=0).flatten(),
    )
    return rows, lengths


def in_windows(values: Tensor, size: int, fill: int) -> Tensor:
    """Cut (B, tokens) into windows, (B * W, size); what is missing at the end of a row is filled."""
    missing = -values.shape[1] % size
    return torch.nn.functional.pad(values, (0, missing), value=fill).reshape(-1, size)


def repeat_draws(s: Tensor, count: int) -> Tensor:
    """Give each of ``count`` sequences per row the draw of the row: (..., B, D) becomes (..., B * count, D).

    Draws that all rows share, (..., 1, D), stay as they are.
    """
    return s.repeat_interleave(count, dim=-2) if s.dim() > 1 and s.shape[-2] > 1 else s


def read_windows(read: Callable[[Batch, Tensor], Tensor], rows: Batch, tokens: Tensor, s: Tensor, rule: Rule) -> Tensor:
    """Read all windows under the draws of their rows, and combine them.

    Args:
        read: Gives the outputs (..., B * W, K) of windows under latents.
        rows: B * W windows.
        tokens: Number of tokens for which each window counts, (B, W).
        s: Latents, (..., 1, D) or (..., B, D).
        rule: ``"logits"`` or ``"probs"``.

    Returns:
        (..., B, K) outputs of the rows.
    """
    return combine(read(rows, repeat_draws(s, tokens.shape[1])), tokens, rule)


def combine(outputs: Tensor, lengths: Tensor, rule: Rule) -> Tensor:
    """Combine the outputs of windows.

    Args:
        outputs: Outputs of B * W windows, (..., B * W, K).
        lengths: Number of tokens of each window, (B, W).
        rule: ``"logits"`` or ``"probs"``.

    Returns:
        (..., B, K) outputs of the rows; for ``"probs"``, log probabilities.

    Example:
        >>> import torch
        >>> halves = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> combine(halves, torch.tensor([[8, 8]]), "probs").exp()
        tensor([[0.7000, 0.3000]])
    """
    each, tokens = outputs.unflatten(-2, lengths.shape), lengths.to(outputs.dtype)
    weights = (tokens / tokens.sum(1, keepdim=True)).unsqueeze(-1)
    if rule == "probs":
        return (each.log_softmax(-1) + weights.log()).logsumexp(-2)
    return (each * weights).sum(-2)
