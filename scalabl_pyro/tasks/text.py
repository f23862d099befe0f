"""Texts and pairs of texts under a head of the model: classes and numbers."""

import numbers
from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints
from transformers import PreTrainedTokenizerBase

from .._errors import nearest
from ..data.batch import Batch, Example
from ..data.rows import Row
from ..lora.forward import LatentLLM
from .base import Task, field_of


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
        texts = [str(field_of(row, name)) for name in (self.text, self.text_pair) if name is not None]
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

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        classes: Sequence[str],
        text: str = "text",
        text_pair: str | None = None,
        target: str = "label",
        max_length: int | None = None,
    ) -> None:
        super().__init__(tokenizer, text=text, text_pair=text_pair, target=target, max_length=max_length)
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
