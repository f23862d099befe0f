"""The task that assigns a class to a text by the probability with which an LLM writes the class's name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._errors import check_flag
from .._values import is_missing, shown
from ..data.batch import Batch, Example
from ..data.encoding import check_tokens
from ..data.labels import ClassName, as_classes, class_index
from ..data.rows import Row
from ..lora.adapter import Adapter
from ..lora.forward import LatentLLM
from ..lora.token_log_probs import NO_TOKEN
from ..storage.budget import Budget
from .base import Task
from .chat import check_chat_options
from .choice_columns import check_column
from .completion import Completion
from .fields import text_of
from .label_prompt import LabelPrompt
from .long_prompts import PromptTask
from .windows import Rule, repeat_draws

#: Options besides those of long prompts.
OWN = ("classes", "template", "chat", "chat_options", "end_token", "text", "target")


class LabelCompletion(PromptTask):
    r"""Task that assigns a class to a text. A causal LM scores the name of each class, which may have several tokens.

    The score of a class is the sum of the log probabilities of its tokens behind the prompt, and the likelihood is
    categorical: p(y = c) = exp(score_c) / sum_k exp(score_k). Each row is read once per class. If each name is one
    token, :class:`~scalabl_pyro.MultipleChoice` with ``labels=`` has the same likelihood and reads each row once.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        classes: Names of the classes, which the LLM writes. The label of a row is a name or an index, and -1 stands for
            an unknown class.
        template: The prompt, with ``{text}``.
        chat: Whether to apply the tokenizer's chat template to the prompt. By default, it is applied if it exists.
        chat_options: Options of the chat template, such as ``{"enable_thinking": False}``.
        end_token: Whether the end token belongs to each name. It is needed if one name begins with another.
        text: Name of the field of the text.
        target: Name of the field of the label.
        max_length: Longest prompt in tokens. A longer text loses its end.
        windows: How a longer text is read in windows, each with a piece of it in the whole prompt, instead of losing
            its end; see :class:`~scalabl_pyro.SequenceClassification`. Default: no windows.
        overlap: Number of tokens of the text that a window shares with the one before it.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: There are fewer than two classes, one name begins with another, the tokenizer joins prompt and name,
            or the template does not contain ``{text}``.

    Example:
        >>> from scalabl_pyro.tasks import LabelCompletion
        >>> task = LabelCompletion(tokenizer, classes=["blue sky", "green grass"], chat=False)
        >>> task.prompt({"text": "what a day"}), task.encode({"text": "what a day", "label": "blue sky"}).target
        ('what a day\nLabel:', 0)
    """

    options = (*OWN, "max_length", "windows", "overlap")
    added_options: ClassVar[Mapping[str, Any]] = {"windows": None, "overlap": 0}
    without_tokenizer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        classes: Sequence[ClassName],
        template: str = "{text}\nLabel:",
        chat: bool | None = None,
        chat_options: Mapping[str, Any] | None = None,
        end_token: bool = False,
        text: str = "text",
        target: str = "label",
        max_length: int | None = None,
        windows: Rule | None = None,
        overlap: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        self.set_windows(windows, overlap, field="text")
        self._set_options(classes, template, chat, chat_options, end_token, text, target)
        _ = self._prompt.labels  # wrong names raise here, and not at the first row

    def _set_options(
        self,
        classes: Any,
        template: Any,
        chat: Any,
        chat_options: Any,
        end_token: Any,
        text: Any,
        target: Any,
    ) -> None:
        """Check and keep the options; the tokenizer does not run."""
        tokenizer = self.tokenizer
        if chat is not None:
            check_flag(chat=chat)
        check_flag(end_token=end_token)
        check_column("text", text)
        check_column("target", target)
        if not isinstance(template, str) or "{text}" not in template:
            raise ValueError(f"template={shown(template)} must contain '{{text}}'.")
        if chat and not tokenizer.chat_template:
            raise ValueError("chat=True, but the tokenizer has no chat template: use chat=False.")
        if end_token and tokenizer.eos_token_id is None:
            raise ValueError("end_token=True, but the tokenizer has no end token: set tokenizer.eos_token.")
        self.classes: tuple[ClassName, ...] = as_classes(classes)
        self.template, self.text, self.target = template, text, target
        self.chat = bool(tokenizer.chat_template) if chat is None else chat
        self.chat_options = check_chat_options(chat_options) or None
        self.end_token = end_token
        self._prompt = LabelPrompt(
            tokenizer,
            tuple(map(str, self.classes)),
            template,
            chat_options=self.chat_options or {} if self.chat else None,
            end_token=end_token,
        )
        self._scorer = Completion(tokenizer, chat=False, end_token=False)

    @classmethod
    def from_saved(
        cls, tokenizer: PreTrainedTokenizerBase | None, options: Mapping[str, Any], *, budget: Budget
    ) -> "LabelCompletion":
        """Build the task from the options in an untrusted file; the tokenizer does not run before the first use."""
        classes, template = options.get("classes"), options.get("template")
        if tokenizer is None or not isinstance(classes, list) or not isinstance(template, str):
            raise ValueError(
                f"expected a tokenizer, 'classes', a list, and 'template', a text; found {shown(classes)}."
            )
        size = len(template) * len(classes) + sum(len(str(name)) for name in classes)
        budget.spend("characters", size, "the task, with its classes and its template,")
        task = cls.__new__(cls)
        Task.__init__(task, tokenizer, max_length=options.get("max_length"))
        task.set_windows(options.get("windows"), options.get("overlap", 0), field="text")
        task._set_options(*(options.get(name) for name in OWN))
        return task

    @property
    def row_fields(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the fields of a row."""
        return (self.text, self.target)

    def prompt(self, row: Row) -> str:
        """Return the text that the LLM continues with the name of a class."""
        return self._prompt.before(text_of(row, self.text))

    def encode(self, row: Row) -> Example:
        """Tokenize the prompt, and find the index of the class.

        Raises:
            ValueError: A field is missing or has a wrong value, or ``max_length`` leaves no room for the text.
        """
        text, value = text_of(row, self.text), row.get(self.target)
        index = None if is_missing(value) else class_index(value, self.classes)
        return self.prompts.example(text, self._prompt.tokens, index)

    def check_llm(self, adapter: Adapter, examples: Sequence[Example]) -> None:
        """Check that an LLM can read examples of this task with the name of each class, and that it is a causal LM.

        Raises:
            ValueError: The LLM has no language model head, looks ahead, or lacks a token or a position.
        """
        longest = max(self._prompt.labels, key=len)
        size = None if self.window_length is None else self.window_length + len(longest)
        whole = [Example({"input_ids": e.inputs["input_ids"] + longest}, longest) for e in examples]
        check_tokens(whole, adapter.module, self.pad_token_id, window_length=size)
        self._scorer.probe(adapter, [self.prompts.first(example) for example in examples])

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the log probability of the name of each class, nats, shape (..., B, C).

        Args:
            llm: The LLM.
            batch: B rows.
            s: Latents, (..., 1, D) or (..., B, D).
        """
        return self.prompts.outputs(lambda prompts, s: self._label_scores(llm, prompts, s), batch, s)

    def _label_scores(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the log probability of each name behind each prompt."""
        count = len(self.classes)
        scores = self._scorer.outputs(llm, self._with_each_label(batch), repeat_draws(s, count)).sum(-1)
        return scores.unflatten(-1, (len(batch), count))

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Build the categorical distribution over the classes."""
        return dist.Categorical(logits=outputs)

    def _with_each_label(self, batch: Batch) -> Batch:
        """Return the batch of B * C rows, in which each prompt goes on with the name of each class."""
        ids, last = batch.inputs["input_ids"], batch.last
        labels = self._prompt.label_tensor(NO_TOKEN).to(ids.device)
        count, length = labels.shape
        shape = (len(batch), count, length)
        places = (last.unsqueeze(-1) + 1 + torch.arange(length, device=ids.device)).unsqueeze(1).expand(shape)
        target = labels.unsqueeze(0).expand(shape)
        whole = ids.new_full((len(batch), count, ids.shape[1] + length), self.pad_token_id)
        whole[..., : ids.shape[1]] = ids.unsqueeze(1)
        whole = whole.scatter(2, places, target.masked_fill(target == NO_TOKEN, self.pad_token_id))
        return replace(
            batch,
            inputs={"input_ids": whole.flatten(0, 1)},
            target=target.flatten(0, 1),
            index=batch.index.repeat_interleave(count),
            last=last.repeat_interleave(count) + length,
            extras={"positions": (places - 1).flatten(0, 1)},
        )
