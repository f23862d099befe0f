"""Completions: the answer is a text of any length, and its likelihood is that of all its tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._errors import check_choice, check_flag
from ..data.batch import Batch, Example
from ..data.encoding import check_tokens
from ..data.rows import Row
from ..lora.adapter import Adapter
from ..lora.binding import Readout
from ..lora.forward import LatentLLM
from ..lora.gradient_checkpointing import dropouts_of
from ..lora.head_check import ends_with_head
from ..lora.look_ahead import looks_ahead
from ..lora.targets import is_encoder_decoder, output_head
from ..lora.token_log_probs import MAX_LOGITS, NO_TOKEN, TokenLogProbs
from ..storage.budget import Budget
from .base import Task, at_least_float32
from .chat import check_chat_options
from .choice_columns import check_column
from .completion_rows import CompletionRows
from .decoder_inputs import decoder_inputs
from .given_tokens import GivenTokens

#: Names of the fields of a row, by option.
COLUMNS = {"prompt": "prompt", "target": "completion", "messages": "messages"}
#: Which answers of a conversation the likelihood counts.
Turns = Literal["all", "last"]


class Completion(Task):
    """Task for texts of any length: the LLM continues a prompt, or answers in a conversation.

    Rows have one of the forms of TRL: ``{"prompt": str, "completion": str}``, the same with lists of messages, or
    ``{"messages": [...]}``; the names of the fields are options. The log likelihood of a row is the sum over the tokens
    of its completion, sum_t log p(y_t | y_<t, x, s), and one row is one observation. Tokens of the prompt do not count.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        chat: Whether texts are written as a conversation, by the tokenizer's chat template. None does so for lists of
            messages only, as TRL does.
        chat_options: Options of the chat template, such as ``{"enable_thinking": False}``.
        turns: Which answers of a conversation count: ``"all"`` answers of the assistant, or the ``"last"`` one. Answers
            in the prompt never count.
        end_token: Whether the end token belongs to a completion that is given as a text. Without it, generation does
            not learn where to stop. Chat templates write their own end.
        max_length: Longest row in tokens. A longer row loses the start of its prompt, but not its first special token,
            and never a part of its completion. With an encoder-decoder, it holds for prompt and completion each.
        encoder_decoder: Whether the model is an encoder-decoder such as T5: the encoder reads the prompt, and the
            decoder writes the completion.
        prompt: Name of the field of the prompt.
        target: Name of the field of the completion.
        messages: Name of the field of the conversation.

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

    options = ("chat", "chat_options", "turns", "end_token", "max_length", "encoder_decoder", *COLUMNS)
    added_options: ClassVar[Mapping[str, Any]] = COLUMNS
    without_tokenizer = False
    scores_only = True
    #: Largest number of logits that the output head computes at one time in training.
    max_logits: int = MAX_LOGITS

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: bool | None = None,
        chat_options: Mapping[str, Any] | None = None,
        turns: Turns = "all",
        end_token: bool = True,
        max_length: int | None = None,
        encoder_decoder: bool = False,
        prompt: str = "prompt",
        target: str = "completion",
        messages: str = "messages",
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if chat is not None:
            check_flag(chat=chat)
        check_flag(end_token=end_token, encoder_decoder=encoder_decoder)
        if chat and encoder_decoder:
            raise ValueError(
                "chat=True writes a conversation, but an encoder-decoder does not continue the prompt: leave it out."
            )
        check_choice("turns", turns, get_args(Turns))
        if chat and not (tokenizer.chat_template or "chat_template" in (chat_options or {})):
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
        self.encoder_decoder = encoder_decoder
        for name, value in {"prompt": prompt, "target": target, "messages": messages}.items():
            check_column(name, value)
        self.prompt, self.target, self.messages = prompt, target, messages
        self._rows = CompletionRows(
            tokenizer,
            chat=bool(chat),
            chat_options=self.chat_options or {},
            only_last=turns == "last",
            end_token=end_token,
            max_length=self.max_length,
            encoder_decoder=encoder_decoder,
            prompt=prompt,
            target=target,
            messages=messages,
        )

    @property
    def row_fields(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the fields of a row with a prompt."""
        return (self.prompt, self.target)

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
        return self._rows.encode(row)

    def prompt_tokens(self, row: Row) -> list[int]:
        """Return the tokens before the completion, from which generation starts.

        With an encoder-decoder, these are the tokens that the encoder reads.

        Raises:
            ValueError: The prompt is missing or has no tokens.
        """
        return self.encode_prompt(row).inputs["input_ids"]

    def encode_prompt(self, row: Row) -> Example:
        """Tokenize what stands before the completion, as an example without an answer; see :meth:`prompt_tokens`."""
        return self._rows.encode_prompt(row)

    def check_llm(self, adapter: Adapter, examples: Sequence[Example]) -> None:
        """Check that an LLM can read examples of this task, and probe how it computes its logits.

        Raises:
            ValueError: The LLM has no language model head, looks ahead, is of another kind than ``encoder_decoder``
                says, or lacks a token or a position.
        """
        super().check_llm(adapter, examples)
        completions = [Example({"input_ids": e.target}) for e in examples if e.target]
        if self.encoder_decoder:
            check_tokens(completions, adapter.module, self.pad_token_id)
        self.probe(adapter, examples)

    def probe(self, adapter: Adapter, examples: Sequence[Example]) -> None:
        """Check that an LLM is of the right kind, and find out how it computes its logits, on a few examples.

        Raises:
            ValueError: The LLM has no language model head, looks ahead, or is of another kind than ``encoder_decoder``
                says.
        """
        ids = torch.tensor([[i for e in examples[:8] for i in e.inputs["input_ids"]]], device=adapter.device)
        self._check_kind(adapter, ids)
        ends_with_head(adapter, self._probe_inputs(ids))

    def check_use(self, call: str) -> None:
        """Refuse what needs the probability of every possible answer."""
        raise TypeError(
            f"{call} needs the probability of every possible answer, and completions are too many. Use "
            "posterior.score(rows) for the probability of given completions, posterior.generate(prompts) to write "
            "some, and fit() or posthoc(method='vi' or 'tfb') to learn a posterior."
        )

    def num_tokens(self, batch: Batch) -> int | None:
        """Return the number of tokens that the likelihood of a batch counts."""
        return None if batch.target is None else int((batch.target != NO_TOKEN).sum())

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
        has_dropout = bool(dropouts_of(llm.adapter))
        readout = TokenLogProbs(batch.target, has_dropout=has_dropout, max_logits=self.max_logits)
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
        inputs: dict[str, Any] = dict(batch.inputs)
        self._check_kind(llm.adapter, batch.inputs["input_ids"])
        if self.encoder_decoder:
            tokens = cast(Tensor, batch.target)
            inputs["decoder_input_ids"] = decoder_inputs(llm.adapter.module, tokens, self.pad_token_id)
        else:
            inputs.pop("attention_mask", None)  # padding stands right of the completion: a causal LM does not see it
        positions = batch.extras["positions"]
        if ends_with_head(llm.adapter, self._probe_inputs(batch.inputs["input_ids"])):
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
        module = adapter.module
        name = type(module).__name__
        is_pair = is_encoder_decoder(module)
        if output_head(module) is None:
            raise ValueError(
                f"Completion needs a language model, and {name} has no head for tokens: load a causal LM with "
                "AutoModelForCausalLM."
            )
        if is_pair != self.encoder_decoder:
            raise ValueError(
                f"{name} is {'an encoder-decoder' if is_pair else 'no encoder-decoder'}: build the task with "
                f"Completion(tokenizer, encoder_decoder={is_pair})."
            )
        if not is_pair and looks_ahead(module, input_ids):
            raise ValueError(
                f"Completion needs a causal LM, but {name} looks ahead: a token would be predicted from itself. Load a "
                "causal LM, such as a model of AutoModelForCausalLM with is_decoder=True in its configuration."
            )

    def _probe_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": input_ids} | ({"decoder_input_ids": input_ids} if self.encoder_decoder else {})
