"""Prompts that go on with the name of a class, and the tokens of these names."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .chat import ChatPrompt
from .label_tokens import separator
from .special_tokens import SpecialTokens


class LabelPrompt:
    """Tokenizes prompts, and the names of classes behind them.

    Nothing is tokenized before the first use.

    Args:
        tokenizer: A Hugging Face tokenizer.
        labels: Names of the classes.
        template: The prompt, with ``{text}``.
        chat_options: Options of the chat template; None for a prompt without it.
        end_token: Whether the end token belongs to each name.

    Example:
        >>> from scalabl_pyro.tasks.label_prompt import LabelPrompt
        >>> prompt = LabelPrompt(tokenizer, ("blue sky", "grass"), "{text} :", chat_options=None, end_token=False)
        >>> [len(tokens) for tokens in prompt.labels]
        [2, 1]
    """

    def __init__(
        self,
        tokenizer: Any,
        labels: Sequence[str],
        template: str,
        *,
        chat_options: Mapping[str, Any] | None,
        end_token: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.names = tuple(labels)
        self.template = template
        self.chat_options = chat_options
        self.end_token = end_token
        self._special = SpecialTokens(tokenizer)

    @functools.cached_property
    def labels(self) -> list[list[int]]:
        """Tokens of each name behind a prompt.

        Raises:
            ValueError: The tokenizer joins prompt and name, two names have the same tokens, or one begins with another.
        """
        found = [self._tokens_behind("?", name) for name in self.names]
        for i, short in enumerate(found):
            for j, other in enumerate(found):
                if i != j and other[: len(short)] == short:
                    raise ValueError(
                        f"the tokens of the class {self.names[j]!r} begin with those of {self.names[i]!r}, so both "
                        "would count the same texts. Use end_token=True, or other names."
                    )
        return found

    def label_tensor(self, fill: int) -> Tensor:
        """Return the tokens of all names, (C, L), with ``fill`` behind shorter ones."""
        length = max(map(len, self.labels))
        return torch.tensor([tokens + [fill] * (length - len(tokens)) for tokens in self.labels])

    def before(self, text: str) -> str:
        """Return what the LLM reads before the name, for a text."""
        return self._split(text)[0]

    def tokens(self, text: str) -> list[int]:
        """Return the tokens before the name, for a text.

        Raises:
            ValueError: The first name has other tokens behind this prompt.
        """
        before, joined = self._split(text)
        ids = self._tokenize(before)
        first = self.labels[0][: len(self.labels[0]) - self.end_token]
        if self._tokenize(before + joined + self.names[0]) != ids + first:
            raise ValueError(
                f"the prompt ends with {before[-12:]!r}, where {self.names[0]!r} has other tokens than in other "
                "prompts. End the template with a text of its own, such as 'Label:'."
            )
        return ids

    @functools.cached_property
    def _chat(self) -> ChatPrompt | None:
        return None if self.chat_options is None else ChatPrompt(self.tokenizer, self.chat_options)

    def _split(self, text: str) -> tuple[str, str]:
        """Return the prompt, and the spaces between it and the name, which belong to the name."""
        filled = self.template.replace("{text}", text)
        if self._chat is None:
            whole = filled + separator(filled, tuple(self.tokenizer.get_added_vocab()))
        else:
            whole = self._chat(filled)
        before = whole.rstrip(" ")
        return before, whole[len(before) :]

    def _tokens_behind(self, text: str, name: str) -> list[int]:
        before, joined = self._split(text)
        ids, whole = self._tokenize(before), self._tokenize(before + joined + name)
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise ValueError(
                f"the tokenizer joins the end of the prompt, {before[-12:]!r}, and the class {name!r}. End the "
                "prompt with a mark such as ':'."
            )
        if self.tokenizer.unk_token_id in whole[len(ids) :]:
            raise ValueError(f"the tokenizer does not know the class {name!r}: choose another name.")
        return whole[len(ids) :] + [self.tokenizer.eos_token_id] * self.end_token

    def _tokenize(self, text: str) -> list[int]:
        if self._chat is None:
            return self._special.begin(text)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
