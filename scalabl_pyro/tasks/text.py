"""Tasks for classification models: a class or a number for a text, or for a pair of texts."""

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
    """Task whose answer comes from the classification head of the model, for a text or a pair of texts."""

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
                raise ValueError(f"{name}={value!r} must be a string, the name of a field of the rows.")
        self.text, self.text_pair, self.target = text, text_pair, target

    def encode(self, row: Row) -> Example:
        """Tokenize the text or the pair of texts, cut at ``max_length`` tokens."""
        texts = [str(field_of(row, name)) for name in (self.text, self.text_pair) if name is not None]
        encoded = self.tokenizer(*texts, truncation=self.max_length is not None, max_length=self.max_length)
        inputs = {k: list(v) for k, v in encoded.items() if k != "attention_mask"}
        is_cut = self.max_length is not None and len(self.tokenizer(*texts).input_ids) > self.max_length
        value = row.get(self.target)
        return Example(inputs, None if value is None else self.parse_target(value), is_cut=is_cut)

    def parse_target(self, value: Any) -> float | int:
        """Convert the answer in a row to a class index or a number."""
        raise NotImplementedError

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """Return the logits of the classification head, shape (..., B, K)."""
        config: Any = getattr(llm.llm, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        pads = getattr(config, "pad_token_id", self.pad_token_id)
        if pads != self.pad_token_id:
            raise ValueError(
                f"The model pads with token {pads}, the tokenizer with {self.pad_token_id}, so the model would not "
                "find the last real token: set model.config.pad_token_id = tokenizer.pad_token_id."
            )
        return super().outputs(llm, batch, s)


class SequenceClassification(_TextTask):
    """Task that assigns a class to a text, for ``AutoModelForSequenceClassification``.

    Rows are ``{"text": str, "label": int}``; the names of the fields are options. If the checkpoint of the model has no
    classification head, the head is trained in full and saved with the posterior.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        classes: Names of the classes, in the order of the head's outputs. The label of a row is an index or a name.
        text: Name of the field of the text.
        text_pair: Name of the field of a second text. Default: there is none.
        target: Name of the field of the label.
        max_length: Number of tokens of the longest text. A longer text loses its end. Default: texts are not cut.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: There are fewer than two classes, or two of them have one name.

    Example:
        >>> from scalabl_pyro import SequenceClassification
        >>> task = SequenceClassification(tokenizer, classes=["no", "yes"])  # any Hugging Face tokenizer
        >>> task.encode({"text": "the sky is blue", "label": "yes"}).target
        1
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
        """Return the index of a class, given by its index or its name."""
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
        """Build the categorical distribution over the classes."""
        assert self.classes is not None
        if outputs.shape[-1] != len(self.classes):
            raise ValueError(
                f"The model's head has {outputs.shape[-1]} outputs, but the task has {len(self.classes)} classes. "
                f"Load the model with num_labels={len(self.classes)}."
            )
        return dist.Categorical(logits=outputs)


class Regression(_TextTask):
    """Task that assigns a number y to a text, for a classification model with one output.

    The likelihood is y ~ Normal(output, noise_scale), and ``noise_scale`` is learned. Rows are
    ``{"text": str, "label": float}``; the names of the fields are options.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        noise_scale: Initial standard deviation of the noise, in units of y.
        options: ``text``, ``text_pair``, ``target`` and ``max_length``, as for :class:`SequenceClassification`.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: ``noise_scale`` is not a positive finite number.

    Example:
        >>> from scalabl_pyro import Regression
        >>> task = Regression(tokenizer, target="stars", noise_scale=0.5)  # any Hugging Face tokenizer
        >>> task.encode({"text": "the sky is blue", "stars": 4}).target
        4.0
    """

    options = ("noise_scale", *_TextTask.options)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, noise_scale: float = 1.0, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if not isinstance(noise_scale, int | float) or not 0 < noise_scale < float("inf"):
            raise ValueError(f"noise_scale={noise_scale!r}: a standard deviation must be a positive finite number.")
        self.noise_scale: Tensor | PyroParam = PyroParam(torch.tensor(float(noise_scale)), constraints.positive)

    def parse_target(self, value: Any) -> float:
        """Convert the answer to a float."""
        return float(value)

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Normal:
        """Build the normal distribution around the single output."""
        if outputs.shape[-1] != 1:
            raise ValueError(f"The model's head has {outputs.shape[-1]} outputs; regression needs num_labels=1.")
        # The scale has the precision of the outputs; otherwise a float64 model would get float32 log densities.
        return dist.Normal(outputs[..., 0], cast(Tensor, self.noise_scale).to(outputs.dtype))
