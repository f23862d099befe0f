"""Tokens of a prompt and its completion, or of a conversation, and which of them the likelihood counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from .._values import shown, text

#: Stands for an answer while a chat template is rendered.
ANSWER = "ANSWERofTHEassistant"
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

    def __init__(self, tokenizer: Any, options: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = options

    def before_answer(self, messages: Sequence[Message]) -> str:
        """Return all text that the template writes before the next answer of the assistant."""
        rendered = self._render([*messages, {"role": "assistant", "content": ANSWER}])
        before, found, _ = rendered.rpartition(ANSWER)
        if not found:
            raise ValueError(
                "the chat template leaves out the answer of the assistant. Set tokenizer.chat_template, or give "
                "'prompt' and 'completion' as texts with chat=False."
            )
        return before

    def spans(self, messages: Sequence[Message], *, only_last: bool) -> Spans:
        """Render a conversation, and find its answers with the token that ends each of them.

        Raises:
            ValueError: The template writes an answer in another way when more turns follow, or leaves text out.
        """
        whole = self._render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        counted = []
        for i in turns[-1:] if only_last else turns:
            before = self.before_answer(messages[:i])
            after = self._render(messages[: i + 1])
            content = messages[i]["content"].strip()
            if not (
                whole.startswith(before) and whole.startswith(after) and content in whole[len(before) : len(after)]
            ):
                hint = "turns='last'" if i != turns[-1] else "another chat template (tokenizer.chat_template)"
                raise ValueError(
                    f"the chat template writes turn {i} in another way inside this conversation than at its end, or "
                    f"leaves text of it out. The tokens of this answer cannot be found: use {hint}."
                )
            counted.append((len(before), self._end(whole, len(before), len(after))))
        return Spans(whole, tuple(counted))

    def _end(self, whole: str, start: int, end: int) -> int:
        """Return where an answer ends: behind its end token, if the template writes one."""
        eos = self.tokenizer.eos_token
        last = whole.rfind(eos, start, end) if eos else -1
        return end if last < 0 else last + len(eos)

    def _render(self, messages: Sequence[Message]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **self.options))
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
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError(f"the field {name!r} must be a list of messages, got {shown(value)}.")
    for message in value:
        if not isinstance(message, dict) or text(message.get("role")) is None or text(message.get("content")) is None:
            raise ValueError(
                f"the field {name!r} has the message {shown(message)}: each message is a dict with the texts 'role' "
                "and 'content', such as {'role': 'user', 'content': 'What color is the sky?'}."
            )
    return [dict(message) for message in value]
