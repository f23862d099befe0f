"""Multiple-choice questions, which the LLM answers with the label of a choice."""

import re
import string
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.batch import Batch, Example
from ..data.labels import choice_index
from ..data.rows import Row
from ..lora.forward import LatentLLM
from .base import Task, at_least_float32, text_of, texts_of


class MultipleChoice(Task):
    """Task for multiple-choice questions. The LLM answers with one token, the label (A, B, C, ...) of a choice.

    Rows are ``{"question": str, "choices": [str, ...], "answer": int}``. The answer may also be a label or the text of
    a choice. In prediction it may be missing (None, NaN, or -1). The likelihood is categorical; its logits are those of
    the labels at the last prompt token.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        labels: One label per choice. Each label must be a single token.
        template: The prompt, with ``{question}`` and, optionally, ``{choices}``.
        chat: Whether to apply the tokenizer's chat template to the prompt. By default, it is applied if it exists.
        max_length: Longest prompt in tokens. A longer question loses its end.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: A label is not one token, or the template does not contain ``{question}``.

    Example:
        >>> from scalabl_pyro import MultipleChoice
        >>> task = MultipleChoice(tokenizer, labels=["A", "B"], chat=False)  # any Hugging Face tokenizer
        >>> task.prompt({"question": "What color is the sky?", "choices": ["red", "blue"]}).splitlines()
        ['What color is the sky?', 'A. red', 'B. blue', 'Answer:']
    """

    options = ("labels", "template", "chat", "max_length")
    without_tokenizer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str] = tuple(string.ascii_uppercase),
        template: str = "{question}\n{choices}\nAnswer:",
        chat: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if not isinstance(labels, Sequence) or len(labels) < 2 or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels={labels!r}: expected two or more texts, such as ('A', 'B', 'C', 'D').")
        if not isinstance(template, str) or "{question}" not in template:
            raise ValueError(f"template={template!r} must contain '{{question}}'.")
        if chat and not tokenizer.chat_template:
            raise ValueError("chat=True, but the tokenizer has no chat template: use chat=False.")
        self.labels = tuple(labels)
        self.template = template
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        ids = self._label_ids()
        self.register_buffer("label_ids", torch.tensor(ids), persistent=False)
        self._largest_id = max(ids)

    @property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the classes: the labels."""
        return self.labels

    def encode(self, row: Row) -> Example:
        """Tokenize the prompt, and find the index of the answer and the number of choices."""
        choices = texts_of(row, "choices")
        if not 2 <= len(choices) <= len(self.labels):
            most = len(self.labels)
            raise ValueError(
                f"the row has {len(choices)} choices. This task has {most} labels, so it allows 2 to {most} choices."
            )
        prompt = self.prompt(row)
        ids = self._tokens(prompt)
        is_cut = self.max_length is not None and len(ids) > self.max_length
        if is_cut:
            ids = self._shorten(row)
        answer = choice_index(row.get("answer"), self.labels, choices)
        return Example({"input_ids": ids}, answer, {"num_choices": len(choices)}, is_cut=is_cut)

    def prompt(self, row: Row) -> str:
        """Return the text that the LLM continues with a label."""
        choices = texts_of(row, "choices")
        lines = "\n".join(f"{label}. {choice}" for label, choice in zip(self.labels, choices, strict=False))
        fill = {"{choices}": lines, "{question}": text_of(row, "question")}
        text = re.sub(r"\{(choices|question)\}", lambda match: fill[match[0]], self.template)
        if not self.chat:
            return text
        message = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the logits of all labels at the last prompt token, shape (..., B, labels)."""
        # Padding stands right of the last token, so a causal LM does not see it. Without a mask, attention uses its
        # fastest kernel, and the host does not wait to read the mask.
        inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
        logits = llm(**inputs, s=s, positions=batch.last).logits
        if logits.dim() < 3 or logits.shape[-1] <= self._largest_id:
            raise ValueError(
                f"The last dimension of the model's logits has size {logits.shape[-1]}. MultipleChoice needs logits of "
                f"each token, of size {self._largest_id + 1} or more, because the token of a label has the id "
                f"{self._largest_id}. Load a causal LM (AutoModelForCausalLM) with its own tokenizer."
            )
        logits = logits[..., 0, :]
        return at_least_float32(logits[..., self.label_ids.to(logits.device)])

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Build the categorical distribution over the choices of each row."""
        label = torch.arange(outputs.shape[-1], device=outputs.device)
        missing = label >= batch.extras["num_choices"].unsqueeze(-1)
        return dist.Categorical(logits=outputs.masked_fill(missing, -torch.inf))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=not self.chat).input_ids

    def _label_ids(self) -> list[int]:
        """Return the token of each label after a prompt: at the start of a line in a chat, else after a space."""
        prompt = self.prompt({"question": "?", "choices": []})
        head = self._tokens(prompt)
        if not self.chat and self.tokenizer.eos_token_id is not None and head[-1:] == [self.tokenizer.eos_token_id]:
            raise ValueError(
                "The tokenizer appends an end-of-text token to prompts, so the LLM would predict what follows the end "
                "of a text: set tokenizer.add_eos_token = False."
            )
        ids = []
        for label in self.labels:
            tokens = self._tokens(prompt + ("" if self.chat else " ") + label)
            if tokens[: len(head)] != head or len(tokens) != len(head) + 1:
                pieces = self.tokenizer.convert_ids_to_tokens(tokens[len(head) :])
                raise ValueError(
                    f"The label {label!r} is not one token after this prompt (it becomes {pieces}): choose labels "
                    "of one token, such as A, B, C, or short words."
                )
            if tokens[-1] == self.tokenizer.unk_token_id:
                raise ValueError(f"The tokenizer does not know the label {label!r}: choose another.")
            ids.append(tokens[-1])
        if len(set(ids)) < len(ids):
            raise ValueError(f"labels={self.labels}: two labels become the same token.")
        return ids

    def _shorten(self, row: Row) -> list[int]:
        """Cut the end of the question, but never the choices or the end of the prompt."""
        assert self.max_length is not None
        question = self.tokenizer(text_of(row, "question"), add_special_tokens=False).input_ids
        ids = self._tokens(self.prompt(row))
        while question and len(ids) > self.max_length:
            question = question[: self.max_length - len(ids)]
            ids = self._tokens(self.prompt({**row, "question": self.tokenizer.decode(question)}))
        if not question:
            raise ValueError(
                f"max_length={self.max_length} is too small: the rest of the prompt leaves no room for the question. "
                "Increase max_length."
            )
        return ids
