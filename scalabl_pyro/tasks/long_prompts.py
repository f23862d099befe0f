"""Prompts with a text that is too long: the text loses its end, or the prompt is asked about one piece after another.

A row with windows holds one prompt per piece of its text. Each prompt but the last one is padded to ``max_length``
tokens, so a row is a multiple of windows as for :mod:`scalabl_pyro.tasks.windows`, and combines them by the same rules.
The weight of a window is its share of the tokens of the text. The rest of the prompt is the same in each window, and
does not count.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..data.batch import Batch, Example
from .base import Task
from .windows import Rule, check_windows, context_of, in_windows, read_windows

#: Names of the numbers that a row keeps of each window: tokens of its prompt, and of its piece of the text.
PROMPT, TEXT = "window_tokens", "window_text_tokens"
#: Log score of an answer that a row does not have, where probabilities are averaged. The gradient of -inf is NaN.
ABSENT = -1e30


class LongPrompts:
    """How a task turns prompts of any length into examples, and the outputs of windows into outputs of rows.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_length: Longest prompt in tokens; None for no limit.
        windows: Rule that combines the windows of a row; None cuts the end of the text.
        overlap: Number of tokens of the text that a window shares with the one before it.
        field: What the rows call the text, for error messages.

    Raises:
        ValueError: An option is wrong, missing or without effect.

    Example:
        >>> prompts = LongPrompts(tokenizer, 4, "logits", 0, field="text")
        >>> example = prompts.example("the sky is blue", lambda text: tokenizer(text + " ?").input_ids, None)
        >>> example.extras["window_text_tokens"]  # three words and a question mark, then one word and a question mark
        [3, 1]
    """

    def __init__(self, tokenizer: Any, max_length: int | None, windows: Any, overlap: Any, *, field: str) -> None:
        self.tokenizer = tokenizer
        self.field = field
        self.max_length = context_of(tokenizer) if windows is not None and max_length is None else max_length
        self.overlap = check_windows(windows, overlap, self.max_length, can_mix=True, has_pair=False)
        self.windows: Rule | None = windows

    def example(
        self, text: str, tokens_of: Callable[[str], list[int]], target: Any, extras: dict[str, Any] | None = None
    ) -> Example:
        """Tokenize the prompt of a text.

        Args:
            text: The text, which is cut or read in pieces.
            tokens_of: Gives the tokens of the prompt about a text.
            target: Answer of the row.
            extras: Other numbers of the row.

        Raises:
            ValueError: ``max_length`` leaves no room for the text, or the tokenizer cannot make windows.
        """
        ids, extras = tokens_of(text), extras or {}
        limit = self.max_length
        is_long = limit is not None and len(ids) > limit
        if self.windows is None:
            shorter = self._cut(text, tokens_of, len(ids)) if is_long else ids
            return Example({"input_ids": shorter}, target, extras, is_cut=is_long)
        found = self._windows(text, tokens_of, len(ids)) if is_long else [(ids, 1)]
        pad = self.tokenizer.pad_token_id
        whole = [token for ids, _ in found[:-1] for token in ids + [pad] * (cast(int, limit) - len(ids))]
        counts = {PROMPT: [len(ids) for ids, _ in found], TEXT: [count for _, count in found]}
        return Example({"input_ids": whole + found[-1][0]}, target, {**extras, **counts})

    def first(self, example: Example) -> Example:
        """Return an example with the tokens of the first window only."""
        counts = example.extras.get(PROMPT)
        if counts is None:
            return example
        return replace(example, inputs={name: values[: counts[0]] for name, values in example.inputs.items()})

    def outputs(self, read: Callable[[Batch, Tensor], Tensor], batch: Batch, s: Tensor) -> Tensor:
        """Return the outputs of rows, (..., B, K).

        Args:
            read: Gives the outputs (..., B, K) of a batch of B prompts under latents.
            batch: B rows.
            s: Latents, (..., 1, D) or (..., B, D).
        """
        size = self.max_length
        if self.windows is None or size is None or batch.inputs["input_ids"].shape[1] <= size:
            return read(batch, s)
        rows, weights = split_prompts(batch, size, self.tokenizer.pad_token_id)
        return read_windows(read, rows, weights, s, self.windows)

    def _cut(self, text: str, tokens_of: Callable[[str], list[int]], length: int) -> list[int]:
        """Cut the end of the text, but never the rest of the prompt."""
        assert self.max_length is not None
        tokens = self.tokenizer(text, add_special_tokens=False).input_ids
        ids: list[int] = []
        while tokens and length > self.max_length:
            tokens = tokens[: self.max_length - length]
            ids = tokens_of(self.tokenizer.decode(tokens))
            length = len(ids)
        if not tokens:
            raise ValueError(self._no_room())
        return ids

    def _windows(self, text: str, tokens_of: Callable[[str], list[int]], length: int) -> list[tuple[list[int], int]]:
        """Return tokens of the prompt about each piece of a long text, and the number of tokens of the piece."""
        if not self.tokenizer.is_fast:
            raise ValueError(f"windows= needs a fast tokenizer, and {type(self.tokenizer).__name__} is a slow one.")
        limit = cast(int, self.max_length)
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        room = limit - (length - len(spans))
        found: list[tuple[list[int], int]] = []
        start, stop = 0, 0
        while stop < len(spans):
            stop = min(start + max(room, 0), len(spans))
            ids: list[int] = []
            while stop > start:  # a piece may have other tokens than it has inside the text
                ids = tokens_of(text[spans[start][0] : spans[stop - 1][1]])
                if len(ids) <= limit:
                    break
                stop -= len(ids) - limit
            if stop - start <= self.overlap:
                raise ValueError(self._no_room(max(stop - start, 0)))
            found.append((ids, stop - start))
            start = stop - self.overlap
        return found

    def _no_room(self, room: int = 0) -> str:
        if self.overlap:
            return (
                f"max_length={self.max_length} leaves {room} tokens of a prompt for its {self.field}, which must be "
                f"more than overlap={self.overlap}. Increase max_length."
            )
        return (
            f"max_length={self.max_length} is too small: the rest of the prompt leaves no room for the {self.field}. "
            "Increase max_length."
        )


def split_prompts(batch: Batch, size: int, pad_token_id: int) -> tuple[Batch, Tensor]:
    """Make a row of each window.

    Args:
        batch: B rows that :meth:`LongPrompts.example` made.
        size: Number of tokens of a window.
        pad_token_id: Token behind the end of a prompt.

    Returns:
        Batch of B * W rows, where W is the number of windows of the longest row, and the number of tokens of the text
        in each window, (B, W). Windows behind the end of a row hold padding, and have 0 tokens.
    """
    ids = in_windows(batch.inputs["input_ids"], size, pad_token_id)
    count = len(ids) // len(batch)

    def of_each(name: str) -> Tensor:
        values = batch.extras[name][:, :count]
        return torch.nn.functional.pad(values, (0, count - values.shape[1]))

    prompts, texts = of_each(PROMPT), of_each(TEXT)
    lengths = prompts.flatten().clamp(min=1)  # attention to no token at all would be NaN
    mask = torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
    rows = replace(
        batch,
        inputs={"input_ids": ids, "attention_mask": mask.to(batch.inputs["attention_mask"].dtype)},
        index=batch.index.repeat_interleave(count),
        last=lengths - 1,
        extras={
            name: values.repeat_interleave(count, dim=0)
            for name, values in batch.extras.items()
            if name not in (PROMPT, TEXT)
        },
    )
    return rows, texts


class PromptTask(Task):
    """Task whose prompt holds one text, which may be too long."""

    prompts: LongPrompts
    overlap: int = 0

    def set_windows(self, windows: Any, overlap: Any, *, field: str) -> None:
        """Check and keep the options of windows; the tokenizer does not run."""
        self.prompts = LongPrompts(self.tokenizer, self.max_length, windows, overlap, field=field)
        self.max_length = self.prompts.max_length
        self.windows, self.overlap = self.prompts.windows, self.prompts.overlap
