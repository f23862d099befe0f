"""Tokens of a prompt and its completion, or of a conversation, and which of them the likelihood counts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from .._values import shown, text
from .chat import ANSWER, ChatTemplate
from .fields import check_characters

Message = dict[str, Any]
"""One turn of a conversation, with ``role`` and ``content``."""


@dataclass(frozen=True)
class Spans:
    """A text, and the parts of it that the likelihood counts.

    Attributes:
        text: The whole text.
        counted: Start and end of each counted part, in characters.
    """

    text: str
    counted: tuple[tuple[int, int], ...]


class Conversation:
    """Renders conversations with a chat template, and finds the answers of the assistant in the text.

    Args:
        tokenizer: Tokenizer with a chat template.
        options: Options of ``apply_chat_template``.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = dict(options)

    def before_answer(self, messages: Sequence[Message]) -> str:
        """Return all text that the template writes before the next answer of the assistant.

        Spaces at its end that the tokenizer joins to the answer are left out: they belong to the answer.

        Raises:
            ValueError: The template leaves out the answer, or text of a message that is not an answer.
        """
        rendered = self._render([*messages, {"role": "assistant", "content": ANSWER}])
        before, found, _ = rendered.rpartition(ANSWER)
        # Templates may leave out thoughts of earlier answers, but nothing that was asked or told.
        told = [m for m in messages if m["role"] not in ("assistant", "tool")]
        lost = [m["role"] for m in told if str(text(m["content"])).strip() not in before]
        if lost or not found:
            what = f"text of a message of the role {lost[0]!r}" if found else "the answer"
            raise ValueError(
                f"the chat template leaves out {what}, or changes it. Set tokenizer.chat_template, or give 'prompt' "
                "and 'completion' as texts with chat=False."
            )
        stripped = before.rstrip(" ")
        return before if stripped == before or self._is_border(before) else stripped

    def spans(self, messages: Sequence[Message], turns: Sequence[int]) -> Spans:
        """Render a conversation, and find answers with the token that ends each of them.

        Args:
            messages: The conversation.
            turns: Indices of the answers, at least one.

        Raises:
            ValueError: An answer is empty, the template writes it in another way when more turns follow, or the
                template leaves text out.
        """
        whole = self._render(messages)
        counted = []
        for i in turns:
            content = str(text(messages[i]["content"])).strip()
            if not content:
                raise ValueError(f"the answer in turn {i} is empty. Give it a text, or leave the row out.")
            before, after = self.before_answer(messages[:i]), self._render(messages[: i + 1])
            if not whole.startswith(after):
                raise ValueError(
                    f"the chat template writes turn {i} in another way when more turns follow it, so its tokens cannot "
                    "be found: use turns='last', or another chat template (tokenizer.chat_template)."
                )
            if not whole.startswith(before) or content not in whole[len(before) : len(after)]:
                raise ValueError(
                    f"the chat template changes the answer in turn {i} or leaves a part of it out, such as thoughts. "
                    "Its tokens cannot be found: set tokenizer.chat_template, or give 'prompt' and 'completion' as "
                    "texts with chat=False."
                )
            behind = whole.index(content, len(before)) + len(content)  # an end token inside the text does not end it
            counted.append((len(before), self._end(whole, behind, len(after))))
        return Spans(whole, tuple(counted))

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        """The chat template, which is read for the first time here."""
        if not (self.tokenizer.chat_template or "chat_template" in self.options):
            raise ValueError(
                "the row is a conversation, but the tokenizer has no chat template: set tokenizer.chat_template, or "
                "give 'prompt' and 'completion' as texts."
            )
        template = ChatTemplate(self.tokenizer, self.options)
        template.warn_of_date()
        return template

    def _is_border(self, before: str) -> bool:
        """Whether an answer begins with a token of its own behind this text."""
        alone, with_answer = (self.tokenizer(t, add_special_tokens=False).input_ids for t in (before, before + ANSWER))
        return bool(with_answer[: len(alone)] == alone)

    def _end(self, whole: str, start: int, end: int) -> int:
        """Return where an answer ends: behind its end token, if the template writes one."""
        eos = self.tokenizer.eos_token
        last = whole.rfind(eos, start, end) if eos else -1
        return end if last < 0 else last + len(eos)

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return self._template.render(list(messages))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}.") from error


def tokens_of(spans: Spans, tokenize: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Tokenize a text, and find the tokens of its counted parts.

    Args:
        spans: The text.
        tokenize: Tokenizer without special tokens at the end.

    Returns:
        All tokens, and the indices of those that are counted.

    Raises:
        ValueError: A token runs over the start or the end of a counted part.
    """
    ids = tokenize(spans.text)
    counted: list[int] = []
    for start, end in spans.counted:
        first, last = (_border(spans.text, cut, ids, tokenize) for cut in (start, end))
        counted += range(first, last)
    return ids, counted


def _border(whole: str, cut: int, ids: list[int], tokenize: Callable[[str], list[int]]) -> int:
    """Return the number of tokens before a cut in a text."""
    if cut == len(whole):
        return len(ids)
    before = tokenize(whole[:cut])
    if ids[: len(before)] != before:
        left, right = whole[:cut][-12:], whole[cut : cut + 12]
        raise ValueError(
            f"the tokenizer joins the end of the prompt, {left!r}, and the start of the completion, {right!r}, so the "
            "completion has other tokens than in generation. Move the space between them to the start of the "
            "completion, and end the prompt with a mark such as ':'."
        )
    return len(before)


def messages_of(value: Any, name: str) -> list[Message]:
    """Check a conversation: a list of dicts with ``role`` and ``content``.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, list | tuple | np.ndarray) or len(value) == 0:  # tables give arrays
        raise ValueError(f"the field {name!r} must be a list of messages, got {shown(value)}.")
    for message in value:
        is_dict = isinstance(message, Mapping)
        if not is_dict or text(message.get("role")) is None or text(message.get("content")) is None:
            raise ValueError(
                f"the field {name!r} has the message {shown(message)}: each message is a dict with the texts 'role' "
                "and 'content', such as {'role': 'user', 'content': 'What color is the sky?'}."
            )
        check_characters(str(text(message["content"])), name)
    return [dict(message) for message in value]
