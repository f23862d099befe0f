"""Rows of completions become tokens: texts, conversations, and pairs for an encoder-decoder."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .._values import is_missing, text
from ..data.batch import Example
from ..data.rows import Row
from .completion_tokens import Conversation, Message, Spans, messages_of, tokens_of
from .fields import field_of, text_of
from .special_tokens import SpecialTokens

NO_TOKENS = "the completion is empty: it has no tokens. Give it a text, or leave the row out."


class _Conversation(NamedTuple):
    """A conversation, and the number of messages that belong to its prompt."""

    messages: list[Message]
    asked: int


@dataclass
class CompletionRows:
    """Tokenizes rows for :class:`~scalabl_pyro.Completion`, which describes the options.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        chat: Whether texts are written as a conversation.
        chat_options: Options of the chat template.
        only_last: Whether only the last answer of a conversation counts.
        end_token: Whether the end token belongs to a completion that is given as a text.
        max_length: Longest row in tokens, or None.
        encoder_decoder: Whether an encoder reads the prompt.
        prompt: Name of the field of the prompt.
        target: Name of the field of the completion.
        messages: Name of the field of the conversation.

    Example:
        >>> from scalabl_pyro.tasks.completion_rows import CompletionRows
        >>> rows = CompletionRows(tokenizer, end_token=False)
        >>> len(rows.encode({"prompt": "the sky is", "completion": " blue"}).target)
        1
    """

    tokenizer: Any
    chat: bool = False
    chat_options: Mapping[str, Any] | None = None
    only_last: bool = False
    end_token: bool = True
    max_length: int | None = None
    encoder_decoder: bool = False
    prompt: str = "prompt"
    target: str = "completion"
    messages: str = "messages"

    def __post_init__(self) -> None:
        self._conversation = Conversation(self.tokenizer, self.chat_options or {})
        self._special = SpecialTokens(self.tokenizer)

    def encode(self, row: Row) -> Example:
        """Tokenize prompt and completion; the target is the tokens of the completion, or None if there is none."""
        if is_missing(row.get(self.messages)) and is_missing(row.get(self.target)):
            return self.encode_prompt(row)
        if self.encoder_decoder:
            return self._encode_pair(row)
        conversation = self._conversation_of(row)
        spans = self._spans(row) if conversation is None else self._chat_spans(*conversation)
        ids, counted = tokens_of(spans, functools.partial(self._tokenize, chat=conversation is not None))
        if not counted:
            raise ValueError(NO_TOKENS)
        if conversation is None and self.end_token:
            counted.append(len(ids))
            ids = [*ids, self.tokenizer.eos_token_id]
        if counted[0] == 0:
            raise ValueError("the prompt is empty, so no token stands before the completion. Give it a text.")
        ids, counted, is_cut = self._shorten(ids, counted)
        target = [ids[i] for i in counted]
        return Example({"input_ids": ids}, target, {"positions": [i - 1 for i in counted]}, is_cut=is_cut)

    def encode_prompt(self, row: Row) -> Example:
        """Return the tokens before the completion, from which generation starts, as an example without an answer.

        With an encoder-decoder, these are the tokens that the encoder reads.

        Raises:
            ValueError: The prompt is missing or has no tokens.
        """
        ids = self._source(row) if self.encoder_decoder else self._asked(row)
        if not ids:
            raise ValueError("the prompt is empty: it has no tokens. Give it a text.")
        cut = self._cut(ids)
        return Example({"input_ids": cut}, None, {"positions": []}, is_cut=len(cut) < len(ids))

    def _asked(self, row: Row) -> list[int]:
        """Return all tokens before the completion."""
        conversation = self._conversation_of(row)
        if conversation is None:
            return self._tokenize(text_of(row, self.prompt))
        messages, asked = conversation
        asked = len(messages) - (messages[-1]["role"] == "assistant") if asked == 0 else asked
        return self._tokenize(self._conversation.before_answer(messages[:asked]), chat=True)

    def _conversation_of(self, row: Row) -> _Conversation | None:
        """Return the conversation of a row, without an answer where it has none; None for texts without a template."""
        if not is_missing(row.get(self.messages)):
            return _Conversation(messages_of(row[self.messages], self.messages), 0)
        prompt, completion = field_of(row, self.prompt), row.get(self.target)
        if text(prompt) is None:
            asked = messages_of(prompt, self.prompt)
            answer = [] if is_missing(completion) else messages_of(completion, self.target)
            return _Conversation([*asked, *answer], len(asked))
        if not self.chat:
            return None
        asked = [{"role": "user", "content": text_of(row, self.prompt)}]
        answer = [] if is_missing(completion) else [{"role": "assistant", "content": text_of(row, self.target)}]
        return _Conversation([*asked, *answer], 1)

    def _spans(self, row: Row) -> Spans:
        prompt, completion = text_of(row, self.prompt), text_of(row, self.target)
        if not completion:
            raise ValueError("the completion is empty. Give it a text, or leave the row out.")
        return Spans(prompt + completion, ((len(prompt), len(prompt + completion)),))

    def _chat_spans(self, messages: list[Message], asked: int) -> Spans:
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"the conversation ends with a message of the role {messages[-1]['role']!r}. Its last message must be "
                "the answer of the 'assistant'."
            )
        answers = [i for i in range(asked, len(messages)) if messages[i]["role"] == "assistant"]
        return self._conversation.spans(messages, answers[-1:] if self.only_last else answers)

    def _encode_pair(self, row: Row) -> Example:
        """Encode a row for an encoder-decoder: the prompt, and the completion with its special tokens."""
        if not is_missing(row.get(self.messages)):
            raise ValueError(
                f"an encoder-decoder reads a {self.prompt!r}, not {self.messages!r}: give {self.prompt!r} and "
                f"{self.target!r}."
            )
        ids = self._source(row)
        cut = self._cut(ids)
        completion = self._spans(row).text[len(text_of(row, self.prompt)) :]
        target = list(self.tokenizer(text_target=completion).input_ids)
        before, behind = map(len, self._special.around)
        target = target[: len(target) - behind]
        if len(target) <= before:
            raise ValueError(NO_TOKENS)
        if self.end_token:
            target.append(self.tokenizer.eos_token_id)
        if self.max_length is not None and len(target) > self.max_length:
            raise ValueError(
                f"max_length={self.max_length} is too small: the completion has {len(target)} tokens. Increase "
                "max_length, or shorten the completion."
            )
        positions = list(range(len(target)))
        return Example({"input_ids": cut}, target, {"positions": positions}, is_cut=len(cut) < len(ids))

    def _source(self, row: Row) -> list[int]:
        """Return the tokens of a prompt for an encoder, with special tokens."""
        prompt = text_of(row, self.prompt)
        if not self.tokenizer(prompt, add_special_tokens=False).input_ids:
            raise ValueError("the prompt is empty: it has no tokens. Give it a text.")
        return [*self._tokenize(prompt), *self._special.around[1]]

    def _tokenize(self, text: str, *, chat: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if chat else self._special.begin(text)

    def _cut(self, ids: list[int]) -> list[int]:
        """Cut the start of a prompt that is too long."""
        surplus = 0 if self.max_length is None else len(ids) - self.max_length
        return ids if surplus <= 0 else self._special.cut(ids, surplus)

    def _shorten(self, ids: list[int], counted: list[int]) -> tuple[list[int], list[int], bool]:
        """Cut the start of the prompt of a row that is too long."""
        surplus = 0 if self.max_length is None else len(ids) - self.max_length
        if surplus <= 0:
            return ids, counted, False
        if surplus > self._special.removable(ids, counted[0]):
            raise ValueError(
                f"max_length={self.max_length} is too small: the row has {len(ids) - counted[0]} tokens from its "
                "first counted token on, and one token of the prompt must stand before them. Increase max_length, "
                "shorten the completion, or use turns='last'."
            )
        return self._special.cut(ids, surplus), [i - surplus for i in counted], True
