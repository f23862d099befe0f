"""Tasks: how a row becomes tokens, and how the LLM's output becomes a distribution over the answer.

A task is the likelihood half of the Pyro program. To write one, subclass :class:`Task` and define ``encode``
(row -> :class:`~scalabl_pyro.data.Example`) and ``likelihood`` (outputs -> distribution); see the how-to page
*Own task*.
"""

import math
import numbers
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints
from transformers import PreTrainedTokenizerBase

from ._errors import nearest
from ._pyro import Program
from .adapted import LatentLLM
from .data import Batch, Example, Row


class Task(Program):
    """Likelihood p(y | outputs of the LLM), and the prompt that asks for y.

    Parameters and PyroParams of a task are learned with everything else and saved with the posterior.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token; None for a module that is fed no text.
        max_length: longest prompt in tokens; longer ones lose the end of their text, which is logged.
    """

    #: Constructor arguments besides the tokenizer, saved with a posterior and given back on loading.
    options: tuple[str, ...] = ("max_length",)
    without_tokenizer = True
    #: Names of the classes; None for a likelihood over numbers.
    classes: Sequence[str] | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, *, max_length: int | None = None) -> None:
        super().__init__()
        if not ((tokenizer is None and self.without_tokenizer) or isinstance(tokenizer, PreTrainedTokenizerBase)):
            raise TypeError(
                f"tokenizer={tokenizer!r}: expected a Hugging Face tokenizer, AutoTokenizer.from_pretrained(...)."
            )
        if tokenizer is not None and tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token, so prompts of different length cannot share a batch: set "
                "tokenizer.pad_token = tokenizer.eos_token."
            )
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"max_length={max_length!r} must be a positive number of tokens, or None.")
        self.tokenizer: Any = tokenizer
        self.max_length = max_length

    @property
    def pad_token_id(self) -> int:
        """Fills the right end of shorter rows."""
        return 0 if self.tokenizer is None else self.tokenizer.pad_token_id

    def encode(self, row: Row) -> Example:
        """Tokenise one row."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(row) -> Example.")

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """What the likelihood needs of the LLM for each row, (..., B, K); by default its logits, float32."""
        return at_least_float32(llm(**batch.inputs, s=s).logits)

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Distribution of y given ``outputs`` (..., B, K): batch shape (..., B)."""
        raise NotImplementedError(f"{type(self).__name__} must define likelihood(outputs, batch) -> distribution.")

    def forward(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """:meth:`likelihood` as a Pyro program, in which the task's PyroParams are param sites."""
        return self.likelihood(outputs, batch)


class MultipleChoice(Task):
    """Answer a question by one token: the label (A, B, C, ...) of a choice.

    Rows are ``{"question": str, "choices": [str, ...], "answer": int}``; the answer may also be a label, and may
    be missing for prediction. The likelihood is categorical over the labels' logits at the last prompt token.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        labels: one label a choice, each a single token; default A to Z.
        template: the prompt, with ``{question}`` and, if wanted, ``{choices}``.
        chat: wrap the prompt with the tokenizer's chat template; default: if it has one.
        max_length: longest prompt in tokens; longer questions are cut at their end.

    Raises:
        ValueError: a label is not one token, or the template lacks ``{question}``.
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
        """The labels."""
        return self.labels

    def encode(self, row: Row) -> Example:
        """Prompt tokens, the index of the answer, and the number of choices."""
        choices = _field(row, "choices")
        if isinstance(choices, str | Mapping) or not isinstance(choices, Iterable):
            raise ValueError(f"choices must be a list of texts, got a {type(choices).__name__}.")
        choices = list(choices)
        if any(_is_missing(choice) for choice in choices):
            raise ValueError(f"choices={choices} has a missing one (None).")
        if not 2 <= len(choices) <= len(self.labels):
            raise ValueError(f"{len(choices)} choices; this task has labels for 2 to {len(self.labels)}.")
        prompt = self.prompt(row)
        ids = self._tokens(prompt)
        is_cut = self.max_length is not None and len(ids) > self.max_length
        if is_cut:
            ids = self._shorten(row)
        answer = self._answer(row.get("answer"), choices)
        return Example({"input_ids": ids}, answer, {"num_choices": len(choices)}, is_cut=is_cut)

    def prompt(self, row: Row) -> str:
        """The text that the LLM is asked to continue with a label."""
        lines = "\n".join(f"{label}. {choice}" for label, choice in zip(self.labels, row["choices"], strict=False))
        fill = {"{choices}": lines, "{question}": str(_field(row, "question"))}
        text = re.sub(r"\{(choices|question)\}", lambda match: fill[match[0]], self.template)
        if not self.chat:
            return text
        message = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Logits of all labels at the last prompt token, (..., B, labels)."""
        # Padding stands right of the last token, where a causal LM does not look; without a mask, attention takes its
        # fastest kernel, and nothing on the host waits to read the mask.
        inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}
        logits = llm(**inputs, s=s, positions=batch.last).logits
        if logits.dim() < 3 or logits.shape[-1] <= self._largest_id:
            raise ValueError(
                f"The model gives {logits.shape[-1]} logits, fewer than the labels need: load a causal LM "
                "(AutoModelForCausalLM) with its own tokenizer."
            )
        logits = logits[..., 0, :]
        return at_least_float32(logits[..., self.label_ids.to(logits.device)])

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Categorical over the choices that a row has."""
        label = torch.arange(outputs.shape[-1], device=outputs.device)
        missing = label >= batch.extras["num_choices"].unsqueeze(-1)
        return dist.Categorical(logits=outputs.masked_fill(missing, -torch.inf))

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=not self.chat).input_ids

    def _label_ids(self) -> list[int]:
        """The token that each label becomes behind a prompt (a chat starts a line, plain text a word)."""
        prompt = self.prompt({"question": "?", "choices": []})
        head = self._tokens(prompt)
        if not self.chat and self.tokenizer.eos_token_id is not None and head[-1:] == [self.tokenizer.eos_token_id]:
            raise ValueError(
                "The tokenizer appends an end-of-text token to prompts, so the LLM would be asked what comes after the "
                "end: set tokenizer.add_eos_token = False."
            )
        ids = []
        for label in self.labels:
            tokens = self._tokens(prompt + ("" if self.chat else " ") + label)
            if tokens[: len(head)] != head or len(tokens) != len(head) + 1:
                pieces = self.tokenizer.convert_ids_to_tokens(tokens[len(head) :])
                raise ValueError(
                    f"The label {label!r} is not one token behind this prompt (it becomes {pieces}): choose labels "
                    "that are, such as A, B, C, or short words."
                )
            if tokens[-1] == self.tokenizer.unk_token_id:
                raise ValueError(f"The tokenizer does not know the label {label!r}: choose another.")
            ids.append(tokens[-1])
        if len(set(ids)) < len(ids):
            raise ValueError(f"labels={self.labels}: two labels become the same token.")
        return ids

    def _answer(self, answer: Any, choices: Sequence[str]) -> int | None:
        if answer is None:
            return None
        index = self.labels.index(answer) if isinstance(answer, str) and answer in self.labels else answer
        if not isinstance(index, numbers.Integral) or int(index) not in range(len(choices)):
            raise ValueError(
                f"answer={answer!r} is outside the {len(choices)} choices: give an index from 0 to {len(choices) - 1}"
                f" or a label from {self.labels[0]} to {self.labels[len(choices) - 1]}."
            )
        return int(index)

    def _shorten(self, row: Row) -> list[int]:
        """Cut the end of the question, never the choices or the cue for the answer."""
        assert self.max_length is not None
        question = self.tokenizer(str(row["question"]), add_special_tokens=False).input_ids
        ids = self._tokens(self.prompt(row))
        while question and len(ids) > self.max_length:
            question = question[: self.max_length - len(ids)]
            ids = self._tokens(self.prompt({**row, "question": self.tokenizer.decode(question)}))
        if not question:
            raise ValueError(f"max_length={self.max_length} leaves no room for the question beside the choices.")
        return ids


class _TextTask(Task):
    """Shared by the tasks whose answer comes from a classification head over a text or a pair of texts."""

    options: tuple[str, ...] = ("text", "text_pair", "target", "max_length")
    without_tokenizer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text: str = "text",
        text_pair: str | None = None,
        target: str = "label",
        max_length: int | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        for name, value in {"text": text, "text_pair": text_pair or "", "target": target}.items():
            if not isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be the name of a field of the rows.")
        self.text, self.text_pair, self.target = text, text_pair, target

    def encode(self, row: Row) -> Example:
        """Tokens of the text (pair), cut at ``max_length``."""
        texts = [str(_field(row, name)) for name in (self.text, self.text_pair) if name is not None]
        encoded = self.tokenizer(*texts, truncation=self.max_length is not None, max_length=self.max_length)
        inputs = {k: list(v) for k, v in encoded.items() if k != "attention_mask"}
        is_cut = self.max_length is not None and len(self.tokenizer(*texts).input_ids) > self.max_length
        value = row.get(self.target)
        return Example(inputs, None if value is None else self.parse_target(value), is_cut=is_cut)

    def parse_target(self, value: Any) -> float | int:
        raise NotImplementedError

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Logits of the classification head, (..., B, K)."""
        config: Any = getattr(llm.llm, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        pads = getattr(config, "pad_token_id", self.pad_token_id)
        if pads != self.pad_token_id:
            raise ValueError(
                f"The model pads with token {pads}, the tokenizer with {self.pad_token_id}, so the "
                "last real token would be missed: set model.config.pad_token_id = tokenizer.pad_token_id."
            )
        return super().outputs(llm, batch, s)


class SequenceClassification(_TextTask):
    """Classes of a text, for ``AutoModelForSequenceClassification``.

    Rows are ``{"text": str, "label": int}`` (other field names by option). A head that the checkpoint lacks is
    trained in full and saved with the posterior.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        classes: names of the classes, in the order of the head's outputs; a row's label may be a name.
        text: field of the text.
        text_pair: field of a second text, for pairs.
        target: field of the label.
        max_length: longest text in tokens; longer ones are cut at their end.
    """

    options = ("classes", *_TextTask.options)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, classes: Sequence[str], **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if isinstance(classes, str) or not isinstance(classes, Sequence) or len(classes) < 2:
            raise ValueError(f"classes={classes!r}: name at least two classes.")
        if len(set(map(str, classes))) < len(classes):
            raise ValueError(f"classes={classes!r}: a name stands twice.")
        self.classes = tuple(map(str, classes))

    def parse_target(self, value: Any) -> int:
        """Index of a class given by index or name."""
        assert self.classes is not None
        if isinstance(value, str):
            if value not in self.classes:
                raise ValueError(f"label {value!r} is not a class. {nearest(value, self.classes)}")
            return list(self.classes).index(value)
        if not isinstance(value, numbers.Real) or value not in range(len(self.classes)):
            raise ValueError(
                f"label {value!r} is outside the {len(self.classes)} classes (0 to {len(self.classes) - 1})."
            )
        return int(float(value))

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Categorical over the classes."""
        assert self.classes is not None
        if outputs.shape[-1] != len(self.classes):
            raise ValueError(
                f"The model's head has {outputs.shape[-1]} outputs, the task {len(self.classes)} classes: load the "
                f"model with num_labels={len(self.classes)}."
            )
        return dist.Categorical(logits=outputs)


class Regression(_TextTask):
    """A number from a text, with learned Gaussian noise, for a classification model with one output.

    Rows are ``{"text": str, "label": float}`` (other field names by option); y ~ Normal(output, noise_scale).

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token.
        noise_scale: standard deviation of the noise to start from, in units of y.
        options: as for :class:`SequenceClassification`.
    """

    options = ("noise_scale", *_TextTask.options)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, noise_scale: float = 1.0, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if not isinstance(noise_scale, int | float) or not 0 < noise_scale < float("inf"):
            raise ValueError(f"noise_scale={noise_scale!r}: a standard deviation must be a positive finite number.")
        self.noise_scale: Tensor | PyroParam = PyroParam(torch.tensor(float(noise_scale)), constraints.positive)

    def parse_target(self, value: Any) -> float:
        """The number itself."""
        return float(value)

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Normal:
        """Normal around the single output."""
        if outputs.shape[-1] != 1:
            raise ValueError(f"The model's head has {outputs.shape[-1]} outputs; regression needs num_labels=1.")
        # In the precision of the outputs, or a float64 model would get its log density with a float32 error.
        return dist.Normal(outputs[..., 0], cast(Tensor, self.noise_scale).to(outputs.dtype))


def at_least_float32(x: Tensor) -> Tensor:
    """Log-probabilities are computed in float32 over a half-precision model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"there is no field {name!r}. {nearest(name, map(str, row))}")
    if _is_missing(row[name]):
        raise ValueError(f"the field {name!r} is missing ({row[name]}).")
    return row[name]


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


#: Tasks that a saved posterior can name.
TASKS: dict[str, type[Task]] = {task.__name__: task for task in (MultipleChoice, SequenceClassification, Regression)}


def describe(task: Task) -> dict[str, Any]:
    """What is saved of a task besides its tensors and its tokenizer."""
    name = type(task).__name__
    if name in TASKS and type(task) is not TASKS[name]:
        name = f"{type(task).__module__}.{name}"  # a namesake of the user's own
    return {"class": name, "options": {option: _jsonable(getattr(task, option)) for option in task.options}}


def from_options(name: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Task:
    """A saved task back.

    Raises:
        ValueError: an option that the task lacks, or a value that it refuses.
    """
    task = TASKS[name]
    if unknown := sorted(set(options) - set(task.options)):
        raise ValueError(f"unknown options of {name}: {unknown}. {nearest(unknown[0], task.options)}")
    return task(tokenizer, **options)


def _jsonable(value: Any) -> Any:
    return value.item() if torch.is_tensor(value) else list(value) if isinstance(value, tuple) else value
