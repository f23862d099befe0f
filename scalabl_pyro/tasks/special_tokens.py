"""The special tokens that a tokenizer writes around a text, and texts that are cut between them."""

import functools
from typing import Any


class SpecialTokens:
    """Tokenizes texts with or without the special tokens of a tokenizer, and cuts the start of long texts.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Example:
        >>> from scalabl_pyro.tasks.special_tokens import SpecialTokens
        >>> SpecialTokens(tokenizer).around  # a tokenizer that writes none
        ([], [])
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer writes before a text, such as BOS, and behind it."""
        plain, whole = (self.tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
        starts = [i for i in range(len(whole)) if list(whole[i : i + len(plain)]) == list(plain)]
        first = starts[0] if plain and starts else 0
        return list(whole[:first]), list(whole[first + len(plain) :])

    def begin(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on: those behind it are left out."""
        return [*self.around[0], *self.tokenizer(text, add_special_tokens=False).input_ids]

    def removable(self, ids: list[int], length: int) -> int:
        """Return how many of the first ``length`` tokens can be cut, so that one stays. BOS stays too."""
        return length - max(self._kept(ids), 1)

    def cut(self, ids: list[int], surplus: int) -> list[int]:
        """Return tokens without ``surplus`` of them from the start of the text, which is behind BOS."""
        kept = self._kept(ids)
        return ids[:kept] + ids[kept + surplus :]

    def _kept(self, ids: list[int]) -> int:
        first = self.around[0]
        return len(first) if ids[: len(first)] == first else 0
