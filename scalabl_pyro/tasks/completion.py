"""Completions: the answer is a text of any length, and its likelihood is that of all its tokens."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._errors import check_choice, check_flag
from ..data.batch import Batch, Example
from ..data.rows import Row
from ..lora.adapter import Adapter
from ..lora.binding import Readout
from ..lora.forward import LatentLLM
from ..lora.head_check import ends_with_head
from ..lora.look_ahead import needs_mask
from ..lora.targets import output_head
from ..lora.token_log_probs import TokenLogProbs
from ..storage.budget import Budget
from .base import Task, at_least_float32, field_of, text_of
from .chat import check_chat_options
from .completion_tokens import Conversation, Message, Spans, messages_of, tokens_of
from .given_tokens import GivenTokens

#: Which answers of a conversation the likelihood counts.
Turns = Literal["all", "last"]


class Completion(Task):
    """Task for texts of any length: the LLM continues a prompt, or answers in a conversation.

    Rows have one of the forms of TRL: ``{"prompt": str, "completion": str}``, the same with lists of messages, or
    ``{"messages": [...]}``. The log likelihood of a row is the sum over the tokens of its completion,
    sum_t log p(y_t | y_<t, x, s), and one row is one observation. Tokens of the prompt do not count.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        chat: Whether texts are written as a conversation, by the tokenizer's chat template. None does so for lists of
            messages only, as TRL does.
        chat_options: Options of the chat template, such as ``{"enable_thinking": False}``.
        turns: Which answers of a conversation count: ``"all"`` answers of the assistant, or the ``"last"`` one.
        end_token: Whether the end token belongs to a completion that is given as a text. Without it, generation does
            not learn where to stop. Chat templates write their own end.
        max_length: Longest row in tokens. A longer row loses the start of its prompt, never a part of its completion.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer, or ``chat_options`` is not a dict.
        ValueError: An option has a wrong value, or the tokenizer has no chat template or end token where one is needed.

    Example:
        >>> from scalabl_pyro import Completion
        >>> task = Completion(tokenizer, chat=False)  # any Hugging Face tokenizer
        >>> example = task.encode({"prompt": "the sky is", "completion": " blue"})
        >>> len(example.target)  # blue, and the end token
        2
    """

    row_fields = ("prompt", "completion")
    options = ("chat", "chat_options", "turns", "end_token", "max_length")
    without_tokenizer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool | None = None,
        chat_options: Mapping[str, Any] | None = None,
        turns: Turns = "all",
        end_token: bool = True,
        max_length: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if chat is not None:
            check_flag(chat=chat)
        check_flag(end_token=end_token)
        check_choice("turns", turns, get_args(Turns))
        if chat and not tokenizer.chat_template:
            raise ValueError("chat=True, but the tokenizer has no chat template: use chat=False.")
        if end_token and not chat and tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has no end token, so a completion cannot end: set tokenizer.eos_token, or pass "
                "end_token=False."
            )
        self.chat = chat
        self.chat_options = check_chat_options(chat_options) or None
        self.turns: str = turns
        self.end_token = end_token
        self._conversation = Conversation(tokenizer, self.chat_options or {})

    @classmethod
    def from_saved(
        cls, tokenizer: PreTrainedTokenizerBase | None, options: Mapping[str, Any], *, budget: Budget
    ) -> "Completion":
        """Build the task from the options in an untrusted file; the tokenizer does not run."""
        if tokenizer is None:
            raise ValueError("expected a tokenizer: Completion needs one.")
        return cls(tokenizer, **options)

    def encode(self, row: Row) -> Example:
        """Tokenize prompt and completion; the target is the tokens of the completion.

        Raises:
            ValueError: A field is missing or has a wrong form, the completion is empty, or a token runs over the border
                of prompt and completion.
        """
        if "messages" not in row and row.get("completion") is None:
            return Example({"input_ids": self.prompt_tokens(row)}, None, {"positions": []})
        messages = self._messages(row, with_completion=True)
        spans = self._spans(row) if messages is None else self._chat_spans(row, messages)
        ids, counted = tokens_of(spans, functools.partial(self._tokenize, chat=messages is not None))
        if messages is None and self.end_token:
            counted.append(len(ids))
            ids = [*ids, self.tokenizer.eos_token_id]
        if not counted:
            raise ValueError("the completion is empty: it has no tokens. Give it a text, or leave the row out.")
        if counted[0] == 0:
            raise ValueError("the prompt is empty, so no token stands before the completion. Give it a text.")
        ids, counted, is_cut = self._shorten(ids, counted)
        target = [ids[i] for i in counted]
        return Example({"input_ids": ids}, target, {"positions": [i - 1 for i in counted]}, is_cut=is_cut)

    def prompt_tokens(self, row: Row) -> list[int]:
        """Return the tokens before the completion, from which generation starts.

        Raises:
            ValueError: The prompt is missing or has no tokens.
        """
        messages = self._messages(row, with_completion=False)
        text = text_of(row, "prompt") if messages is None else self._conversation.before_answer(messages)
        ids = self._tokenize(text, chat=messages is not None)
        if not ids:
            raise ValueError("the prompt is empty: it has no tokens. Give it a text.")
        return ids if self.max_length is None else ids[-self.max_length :]

    def check_llm(self, adapter: Adapter, examples: Sequence[Example]) -> None:
        """Check that an LLM can read examples of this task, and probe how it computes its logits.

        Raises:
            ValueError: The LLM has no language model head or looks ahead, or lacks a token or a position.
        """
        super().check_llm(adapter, examples)
        ids = torch.tensor([[i for e in examples[:8] for i in e.inputs["input_ids"]]], device=adapter.device)
        self._check_kind(adapter, ids)
        ends_with_head(adapter, {"input_ids": ids})

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the log probability of each token of the completions, nats, (..., B, T).

        Raises:
            ValueError: The rows have no completions.
        """
        if batch.target is None:
            raise ValueError(
                "Completion has no list of answers to choose from. Use posterior.score(rows) for the probability of "
                "given completions, or posterior.generate(prompts) to write some."
            )
        readout = TokenLogProbs(batch.target, has_dropout=_has_dropout(llm.adapter))
        return at_least_float32(self.read(llm, batch, s, readout)[..., 0])

    def read(self, llm: LatentLLM, batch: Batch, s: Tensor, readout: Readout) -> Tensor:
        """Run the LLM, and compute numbers of each token of the completions instead of logits.

        Args:
            llm: The LLM.
            batch: B rows with completions of at most T tokens.
            s: Latents, (..., 1, D) or (..., B, D).
            readout: What is computed at the output head.

        Returns:
            Numbers per token, (..., B, T, C).
        """
        # Padding stands right of the completion, so a causal LM does not see it.
        inputs: dict[str, Any] = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
        positions = batch.extras["positions"]
        if ends_with_head(llm.adapter, batch.inputs):
            return cast(Tensor, llm(**inputs, s=s, positions=positions, readout=readout).logits)
        logits = llm(**inputs, s=s, positions=positions).logits
        rows = logits.shape[:-2]
        numbers = readout.repeat(rows, len(batch))(lambda given: given, logits.flatten(0, -3))
        return numbers.unflatten(0, rows)

    def likelihood(self, outputs: Tensor, batch: Batch) -> GivenTokens:
        """Build the distribution of the completions, of which it knows the given ones."""
        if batch.target is None:
            raise NotImplementedError("A completion is generated token by token: use posterior.generate(prompts).")
        return GivenTokens(outputs, batch.target)

    def _check_kind(self, adapter: Adapter, input_ids: Tensor) -> None:
        name = type(adapter.module).__name__
        if output_head(adapter.module) is None or getattr(adapter.module.config, "is_encoder_decoder", False):
            raise ValueError(f"Completion needs a causal LM, and {name} is none: load it with AutoModelForCausalLM.")
        if needs_mask(adapter.module, input_ids):
            raise ValueError(
                f"Completion needs a causal LM, but {name} looks ahead: a token would be predicted from itself. Load a "
                "causal LM, such as a model of AutoModelForCausalLM with is_decoder=True in its configuration."
            )

    def _messages(self, row: Row, *, with_completion: bool) -> list[Message] | None:
        """Return the conversation of a row; None for a text without a chat template."""
        if "messages" in row:
            messages = messages_of(field_of(row, "messages"), "messages")
            return messages if with_completion or messages[-1]["role"] != "assistant" else messages[:-1]
        prompt, completion = field_of(row, "prompt"), row.get("completion") if with_completion else None
        if not isinstance(prompt, str):
            answer = [] if completion is None else messages_of(completion, "completion")
            return [*messages_of(prompt, "prompt"), *answer]
        if not self.chat:
            return None
        asked = [{"role": "user", "content": text_of(row, "prompt")}]
        answer = [{"role": "assistant", "content": text_of(row, "completion")}] if with_completion else []
        return [*asked, *answer]

    def _spans(self, row: Row) -> Spans:
        prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
        if not completion:
            raise ValueError("the completion is empty. Give it a text, or leave the row out.")
        return Spans(prompt + completion, ((len(prompt), len(prompt + completion)),))

    def _chat_spans(self, row: Row, messages: list[Message]) -> Spans:
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"the conversation ends with a message of the role {messages[-1]['role']!r}. Its last message must be "
                "the answer of the 'assistant'."
            )
        only_last = self.turns == "last" or "messages" not in row
        return self._conversation.spans(messages, only_last=only_last)

    @functools.cached_property
    def _first_tokens(self) -> list[int]:
        """Special tokens that the tokenizer writes before a text, such as BOS; those behind it are left out."""
        plain, whole = (self.tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
        return list(whole[: whole.index(plain[0])]) if plain else []

    def _tokenize(self, text: str, *, chat: bool = False) -> list[int]:
        return [*([] if chat else self._first_tokens), *self.tokenizer(text, add_special_tokens=False).input_ids]

    def _shorten(self, ids: list[int], counted: list[int]) -> tuple[list[int], list[int], bool]:
        """Cut the start of the prompt of a row that is too long."""
        surplus = 0 if self.max_length is None else len(ids) - self.max_length
        if surplus <= 0:
            return ids, counted, False
        if counted[0] <= surplus:
            raise ValueError(
                f"max_length={self.max_length} is too small: the completion has {len(ids) - counted[0]} tokens, and "
                "one token of the prompt must stand before it. Increase max_length, or shorten the completion."
            )
        return ids[surplus:], [i - surplus for i in counted], True


def _has_dropout(adapter: Adapter) -> bool:
    dropouts = (d for layer in adapter.layers for d in layer.lora_dropout.values())
    return any(isinstance(d, torch.nn.Dropout) for d in dropouts)
