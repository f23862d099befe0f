"""Multiple-choice questions, which the LLM answers with the label of a choice."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._values import shown
from ..data.batch import Batch, Example
from ..data.labels import choice_index
from ..data.rows import Row
from ..lora.adapter import Adapter
from ..lora.forward import LatentLLM
from ..lora.look_ahead import needs_mask
from ..storage.budget import Budget
from .base import Task, at_least_float32
from .chat import ChatPrompt, check_chat_options
from .choice_columns import ChoiceColumns
from .choice_options import check_is_causal, check_labels, check_number, check_template
from .label_tokens import check_end, find_label_tokens, separator
from .long_prompts import ABSENT, PromptTask
from .windows import Rule

#: Labels where none are given: as many of these letters as the tokenizer knows as one token.
LETTERS = tuple(string.ascii_uppercase)
#: Names of the fields of a row, by option.
COLUMNS = {"question": "question", "choices": "choices", "target": "answer"}


class MultipleChoice(PromptTask):
    """Task for multiple-choice questions. The LLM answers with one token, the label (A, B, C, ...) of a choice.

    Rows are ``{"question": str, "choices": [str, ...], "answer": int}``; the names of the fields are options. The
    answer may also be a label or the text of a choice. In prediction it may be missing (None, NaN, or -1). The
    likelihood is categorical; its logits are those of the labels at the last prompt token.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        labels: One label per choice. Each label must be a single token after the prompt. By default, the labels are the
            letters from A on that the tokenizer knows as single tokens, at most 26.
        template: The prompt, with ``{question}`` and, optionally, ``{choices}``. Other fields are not filled.
        chat: Whether to apply the tokenizer's chat template to the prompt. By default, it is applied if it exists.
        chat_options: Options of the chat template, such as ``{"enable_thinking": False}``. They are passed to the
            tokenizer's ``apply_chat_template``, and saved with the task.
        question: Name of the field of the question.
        choices: Name of the field of the list of choices, or a tuple of names, one per choice.
        target: Name of the field of the answer.
        max_length: Longest prompt in tokens. A longer question loses its end.
        windows: How a longer question is read in windows, each with a piece of it in the whole prompt, instead of
            losing its end; see :class:`~scalabl_pyro.SequenceClassification`. Default: no windows.
        overlap: Number of tokens of the question that a window shares with the one before it.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer, ``chat`` is not a boolean, or ``chat_options`` is not
            a dict.
        ValueError: A label is not one token after the prompt, the template does not contain ``{question}``, or the chat
            template leaves out the question or lets the LLM write other text before its answer.

    Example:
        >>> from scalabl_pyro import MultipleChoice
        >>> task = MultipleChoice(tokenizer, labels=["A", "B"], chat=False)  # any Hugging Face tokenizer
        >>> task.prompt({"question": "What color is the sky?", "choices": ["red", "blue"]}).splitlines()
        ['What color is the sky?', 'A. red', 'B. blue', 'Answer:']
    """

    options = ("labels", "template", "chat", "chat_options", *COLUMNS, "max_length", "windows", "overlap")
    added_options: ClassVar[Mapping[str, Any]] = {**COLUMNS, "windows": None, "overlap": 0}
    without_tokenizer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str] | None = None,
        template: str = "{question}\n{choices}\nAnswer:",
        chat: bool | None = None,
        chat_options: Mapping[str, Any] | None = None,
        question: str = "question",
        choices: str | Sequence[str] = "choices",
        target: str = "answer",
        max_length: int | None = None,
        windows: Rule | None = None,
        overlap: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        self.set_windows(windows, overlap, field="question")
        self._set_options(ChoiceColumns(question, choices, target), labels, template, chat, chat_options)
        self._learn_tokens()

    @classmethod
    def from_saved(
        cls, tokenizer: PreTrainedTokenizerBase | None, options: Mapping[str, Any], *, budget: Budget
    ) -> "MultipleChoice":
        """Build the task from the options in an untrusted file.

        Tokenizer and chat template may come from the same stranger, and may take any time. So they do not run before
        the first use of the task, which finds the tokens of the labels then.
        """
        labels, template = options.get("labels"), options.get("template")
        if not isinstance(labels, list) or not isinstance(template, str):
            raise ValueError(f"expected 'labels', a list, and 'template', a text; found {shown(labels)}.")
        size = len(template) + max((len(label) for label in labels if isinstance(label, str)), default=0)
        budget.spend("characters", size * len(labels), "the task, with its labels and its template,")
        task = cls.__new__(cls)
        Task.__init__(task, tokenizer, max_length=options.get("max_length"))
        task.set_windows(options.get("windows"), options.get("overlap", 0), field="question")
        columns = ChoiceColumns(*(options[name] for name in COLUMNS))
        task._set_options(columns, labels, template, options.get("chat"), options.get("chat_options"))
        return task

    def _set_options(
        self,
        columns: ChoiceColumns,
        labels: Sequence[str] | None,
        template: str,
        chat: bool | None,
        chat_options: Mapping[str, Any] | None,
    ) -> None:
        """Check and keep the options; the tokenizer does not run."""
        tokenizer = self.tokenizer
        given = check_labels(LETTERS if labels is None else labels)
        check_template(template)
        if chat is not None and not isinstance(chat, bool):
            raise TypeError(
                f"chat={chat!r} must be True, False or None. Pass options of the chat template as chat_options=."
            )
        if chat and not tokenizer.chat_template:
            raise ValueError("chat=True, but the tokenizer has no chat template: use chat=False.")
        self.columns = columns
        self.question, self.choices, self.target = columns.question, columns.choices, columns.target
        self.template = template
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        self.chat_options = check_chat_options(chat_options) or None
        if self.chat_options and not self.chat:
            raise ValueError("chat_options has no effect, because the task uses no chat template: leave it out.")
        self.labels = given
        self._labels_are_given = labels is not None
        self._chat: ChatPrompt | None = None
        self._has_tokens = False

    @property
    def row_fields(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the fields of a row."""
        return self.columns.names

    @property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the classes: the labels."""
        return self.labels

    @property
    def label_ids(self) -> Tensor:
        """Token of each label."""
        self._learn_tokens()
        return cast(Tensor, self._label_ids)

    def encode(self, row: Row) -> Example:
        """Tokenize the prompt, and find the index of the answer and the number of choices."""
        self._learn_tokens()
        choices = self.columns.choices_of(row)
        check_number(len(choices), len(self.labels))

        def tokens_of(question: str) -> list[int]:
            return self._prompt_tokens({**row, self.columns.question: question})

        answer = choice_index(self.columns.answer_of(row), self.labels, choices)
        return self.prompts.example(self.columns.question_of(row), tokens_of, answer, {"num_choices": len(choices)})

    def prompt(self, row: Row) -> str:
        """Return the text that the LLM continues with a label.

        In a chat, this is all that the template writes before the answer. Whitespace that joins the label is left out.
        """
        self._learn_tokens()
        before = self._text_before_label(row)
        return before[: len(before) - len(self._joined)]

    def check_llm(self, adapter: Adapter, examples: Sequence[Example]) -> None:
        """Check that an LLM can read examples of this task, and probe whether it looks ahead.

        Args:
            adapter: Adapter inside the LLM.
            examples: Tokenized rows, at least one.

        Raises:
            ValueError: The LLM is an encoder-decoder, reads padding in spite of a mask, or lacks a token or a position.
        """
        check_is_causal(adapter.module)
        super().check_llm(adapter, examples)
        self._label_ids = self.label_ids.to(adapter.device)  # a step that is captured cannot move it
        tokens = [token for example in examples[:8] for token in self.prompts.first(example).inputs["input_ids"]]
        needs_mask(adapter.module, torch.tensor([tokens], device=adapter.device))

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the logits of all labels at the last prompt token, shape (..., B, labels).

        Raises:
            ValueError: The model is not a causal LM, lacks the token of a label, or reads padding in spite of a mask.
        """
        check_is_causal(llm.llm)
        self._learn_tokens()
        return self.prompts.outputs(lambda prompts, s: self._label_logits(llm, prompts, s), batch, s)

    def _label_logits(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the logits of all labels at the last token of each prompt."""
        # Padding stands right of the last token, so a causal LM does not see it. Without a mask, attention uses its
        # fastest kernel, and the host does not wait to read the mask.
        inputs: dict[str, Any] = dict(batch.inputs)
        if not needs_mask(llm.llm, inputs["input_ids"]):
            inputs.pop("attention_mask", None)
        logits = llm(**inputs, s=s, positions=batch.last).logits
        if logits.dim() < 3 or logits.shape[-1] <= self._largest_id:
            raise ValueError(
                f"The last dimension of the model's logits has size {logits.shape[-1]}. MultipleChoice needs logits of "
                f"each token, of size {self._largest_id + 1} or more, because the token of a label has the id "
                f"{self._largest_id}. Load a causal LM (AutoModelForCausalLM) with its own tokenizer."
            )
        logits = logits[..., 0, :]
        logits = at_least_float32(logits[..., self.label_ids.to(logits.device)])
        return logits.masked_fill(_missing(logits, batch), ABSENT) if self.windows == "probs" else logits

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Build the categorical distribution over the choices of each row."""
        return dist.Categorical(logits=outputs.masked_fill(_missing(outputs, batch), -torch.inf))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=not self.chat).input_ids

    def _fill(self, row: Row) -> str:
        """Return the template with question and choices."""
        choices = self.columns.choices_of(row)
        check_number(len(choices), len(self.labels), least=0)
        lines = "\n".join(f"{label}. {choice}" for label, choice in zip(self.labels, choices, strict=False))
        fill = {"{choices}": lines, "{question}": self.columns.question_of(row)}
        return re.sub(r"\{(choices|question)\}", lambda match: fill[match[0]], self.template)

    def _text_before_label(self, row: Row) -> str:
        """Return all text before the label, with the whitespace between prompt and label."""
        text = self._fill(row)
        if self._chat_prompt is not None:
            return self._chat_prompt(text)
        return text + separator(text, tuple(self.tokenizer.get_added_vocab()))

    @property
    def _chat_prompt(self) -> ChatPrompt | None:
        """The chat template, which is rendered for the first time here."""
        if self.chat and self._chat is None:
            self._chat = ChatPrompt(self.tokenizer, self.chat_options or {})
        return self._chat

    def _learn_tokens(self) -> None:
        """Find the token of each label after a prompt, if it is not known yet."""
        if self._has_tokens:
            return
        row = self.columns.example()
        before = self._text_before_label(row)
        check_end(self.tokenizer, self._tokens, before)
        text = self._fill(row)
        after = "" if self._chat_prompt is None else self._chat_prompt.around(text)[1]
        space_first = not self.chat and len(before) > len(text)
        found = find_label_tokens(
            self.tokenizer, self._tokens, before, self.labels, after=after, space_first=space_first
        )
        usable = self.labels
        if found.refused:
            first = next(label for label in self.labels if label in found.refused)
            usable = self.labels[: self.labels.index(first)]
            if self._labels_are_given or len(usable) < 2:
                raise ValueError(found.refused[first])
        ids = list(found.ids[: len(usable)])
        if len(set(ids)) < len(ids) or len(set(usable)) < len(usable):
            raise ValueError(
                f"labels={self.labels}: two labels become the same token. Give each choice a label of its own."
            )
        self.labels = usable
        self.register_buffer("_label_ids", torch.tensor(ids), persistent=False)
        self._first_id, self._largest_id, self._joined = ids[0], max(ids), found.joined
        self._has_tokens = True

    def _prompt_tokens(self, row: Row) -> list[int]:
        """Return the tokens before the label, in the tokenization of prompt and label together."""
        self._learn_tokens()
        before = self._text_before_label(row)
        tokens = self._tokens(before + self.labels[0])
        if tokens[-1] != self._first_id or not before.endswith(self._joined):
            raise ValueError(
                f"The prompt ends with {before[-12:]!r}, where the label {self.labels[0]!r} has another token than in "
                "other prompts. End the template with a text of its own, such as 'Answer:'."
            )
        return tokens[:-1]


def _missing(outputs: Tensor, batch: Batch) -> Tensor:
    """Tell which labels stand for no choice of a row, (B, labels)."""
    return torch.arange(outputs.shape[-1], device=outputs.device) >= batch.extras["num_choices"].unsqueeze(-1)
