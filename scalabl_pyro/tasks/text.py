"""Tasks for classification models: the answer comes from the head, for a text or a pair of texts."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._values import is_missing
from ..data.batch import Batch, Example
from ..data.labels import ClassName, as_classes, class_index
from ..data.model_names import check_model_names
from ..data.rows import Row
from ..lora.forward import LatentLLM
from ..lora.targets import text_config
from .base import Task
from .choice_columns import check_column
from .fields import text_of
from .weighted_categorical import WeightedCategorical, balanced_weights, check_class_weights
from .windows import Rule, check_windows, context_of, read_windows, split_windows, windows_of


class TextTask(Task):
    """Task whose answer comes from the classification head of the model, for a text or a pair of texts."""

    options: tuple[str, ...] = ("text", "text_pair", "target", "max_length", "windows", "overlap")
    added_options: ClassVar[Mapping[str, Any]] = {"windows": None, "overlap": 0}
    #: Whether the probabilities of windows can be averaged, because the outputs are the logits of one class per row.
    can_mix_windows = False
    without_tokenizer = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text: str = "text",
        text_pair: str | None = None,
        target: str = "label",
        max_length: int | None = None,
        windows: Rule | None = None,
        overlap: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if windows is not None and max_length is None:
            self.max_length = context_of(tokenizer)
        has_pair = text_pair is not None
        self.overlap = check_windows(windows, overlap, self.max_length, can_mix=self.can_mix_windows, has_pair=has_pair)
        self.windows = windows
        for name, value in {"text": text, "text_pair": text_pair or "", "target": target}.items():
            check_column(name, value)
        self.text, self.text_pair, self.target = text, text_pair, target

    @property
    def row_fields(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the fields of a row."""
        return [name for name in (self.text, self.text_pair, self.target) if name is not None]

    def encode(self, row: Row) -> Example:
        """Tokenize the text or the pair of texts: cut at ``max_length`` tokens, or in windows of so many."""
        if self.window_length is not None:
            found = windows_of(self.tokenizer, text_of(row, self.text), self.window_length, self.overlap)
            return Example(found, self.answer_of(row))
        texts = [text_of(row, name) for name in (self.text, self.text_pair) if name is not None]
        encoded = self.tokenizer(*texts, truncation=self.max_length is not None, max_length=self.max_length)
        inputs = {k: list(v) for k, v in encoded.items() if k != "attention_mask"}
        is_cut = self.max_length is not None and len(self.tokenizer(*texts).input_ids) > self.max_length
        return Example(inputs, self.answer_of(row), is_cut=is_cut)

    def answer_of(self, row: Row) -> Any:
        """Return the answer of a row as a number; None if the row has no answer."""
        value = row.get(self.target)
        return None if is_missing(value) else self.parse_target(value)

    def parse_target(self, value: Any) -> float | int | None:
        """Convert the answer in a row to a class index or a number; None if it says that the answer is not known."""
        raise NotImplementedError

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the logits of the classification head, shape (..., B, K)."""
        self._check_names(getattr(getattr(llm.llm, "config", None), "id2label", None))
        pads = getattr(text_config(llm.llm), "pad_token_id", self.pad_token_id)
        if pads != self.pad_token_id:
            raise ValueError(
                f"The model pads with token {pads}, the tokenizer with {self.pad_token_id}, so the model would not "
                "find the last real token: set model.config.pad_token_id = tokenizer.pad_token_id."
            )
        size = self.window_length
        if self.windows is None or size is None or batch.inputs["input_ids"].shape[1] <= size:
            return super().outputs(llm, batch, s)
        rows, lengths = split_windows(batch, size, self.pad_token_id)
        whole = super().outputs
        return read_windows(lambda windows, s: whole(llm, windows, s), rows, lengths, s, self.windows)

    def _check_names(self, id2label: Any) -> None:
        """Check the names that the model gives its outputs."""


class SequenceClassification(TextTask):
    """Task that assigns a class to a text, for ``AutoModelForSequenceClassification``.

    Rows are ``{"text": str, "label": int}``; the names of the fields are options. If the checkpoint of the model has no
    classification head, the head is trained in full and saved with the posterior.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        classes: Names of the classes, in the order of the head's outputs. If they are texts, the label of a row is a
            name or an index, and -1 stands for an unknown class. If they are numbers or truth values, as in
            ``classes=[1, 2, 3]``, the label of a row is one of them.
        text: Name of the field of the text.
        text_pair: Name of the field of a second text. Default: there is none.
        target: Name of the field of the label.
        max_length: Number of tokens of the longest text. A longer text loses its end. Default: texts are not cut.
        windows: How a longer text is read as windows of ``max_length`` tokens, instead of losing its end. ``"logits"``
            averages the logits of its windows, ``"probs"`` their probabilities, each window with its share of the
            tokens, also those of the overlap. A row stays one observation. Without ``max_length``, a window has as many
            tokens as the tokenizer's ``model_max_length``. Default: no windows.
        overlap: Number of tokens that a window shares with the one before it.
        class_weights: Weight of the log likelihood of each class, or ``"balanced"`` for N / (C * N_c) with the counts
            of the first fit. Inference then has a weighted likelihood, also in ``laplace``, ``mcmc`` and ``loo``:
            frequent classes lose probability, and the posterior is wider or narrower than that of the data. Default:
            all classes have the weight 1.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: There are fewer than two classes, two of them have one name, they mix texts and numbers, or
            ``class_weights`` are not one positive number per class.

    Example:
        >>> from scalabl_pyro import SequenceClassification
        >>> task = SequenceClassification(tokenizer, classes=["no", "yes"])  # any Hugging Face tokenizer
        >>> task.encode({"text": "the sky is blue", "label": "yes"}).target
        1
    """

    options = ("classes", *TextTask.options, "class_weights")
    added_options: ClassVar[Mapping[str, Any]] = {**TextTask.added_options, "class_weights": None}
    can_mix_windows = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        classes: Sequence[ClassName],
        text: str = "text",
        text_pair: str | None = None,
        target: str = "label",
        max_length: int | None = None,
        windows: Rule | None = None,
        overlap: int = 0,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
    ) -> None:
        fields: dict[str, Any] = {"text": text, "text_pair": text_pair, "target": target}
        super().__init__(tokenizer, max_length=max_length, windows=windows, overlap=overlap, **fields)
        self.classes: tuple[ClassName, ...] = as_classes(classes)
        self.class_weights = check_class_weights(class_weights, len(self.classes))
        self._is_balanced = self.class_weights == "balanced"

    def parse_target(self, value: Any) -> int | None:
        """Return the index of a class, given by its index or its name; None if the class is not known."""
        return class_index(value, self.classes)

    def prepare(self, targets: Sequence[float | int], *, are_all: bool) -> None:
        """Learn balanced weights of the classes from the training targets, if they are asked for.

        Raises:
            ValueError: The weights are asked for, and these are not all targets.
        """
        if self.class_weights == "balanced":
            if not are_all:
                raise ValueError("class_weights='balanced' needs the classes of all rows: pass rows, or give numbers.")
            self.class_weights = balanced_weights(targets, len(self.classes))

    def restart(self) -> None:
        """Forget the weights that :meth:`prepare` learned."""
        if self._is_balanced:
            self.class_weights = "balanced"

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Categorical:
        """Build the categorical distribution over the classes."""
        if outputs.shape[-1] != len(self.classes):
            raise ValueError(
                f"The model's head has {outputs.shape[-1]} outputs, but the task has {len(self.classes)} classes. "
                f"Load the model with num_labels={len(self.classes)}."
            )
        return self._categorical(outputs)

    def _categorical(self, logits: Tensor) -> dist.Categorical:
        """Build the distribution with these logits, and with the weights of the classes."""
        if self.class_weights is None or isinstance(self.class_weights, str):  # not known before the first fit
            return dist.Categorical(logits=logits)
        return WeightedCategorical(logits, torch.tensor(self.class_weights, dtype=logits.dtype, device=logits.device))

    def _check_names(self, id2label: Any) -> None:
        check_model_names(self.classes, id2label)


def single_output(outputs: Tensor) -> Tensor:
    """Return the output of a model with one output, (...), from its outputs (..., 1).

    Raises:
        ValueError: The model has several outputs.

    Example:
        >>> import torch
        >>> single_output(torch.ones(2, 1))
        tensor([1., 1.])
    """
    if outputs.shape[-1] != 1:
        raise ValueError(
            f"The model's head has {outputs.shape[-1]} outputs; regression needs num_labels=1. Load the model with "
            "num_labels=1."
        )
    return outputs[..., 0]
