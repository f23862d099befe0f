"""The task that assigns any number of labels to a text."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import pyro.distributions as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._values import integer, is_missing, plain, shown
from ..data.batch import Batch
from ..data.labels import ClassName, as_classes, class_index
from ..data.model_names import check_model_names
from ..data.rows import Row
from .choice_columns import check_column
from .text import TextTask


class OwnBernoulli(dist.Bernoulli):
    """Bernoulli distribution whose values may be whole numbers, as batches hold them."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log probability of 0 or 1, in nats."""
        return super().log_prob(value.to(self.logits.dtype))


class MultiLabelClassification(TextTask):
    """Task that assigns any number of labels to a text, for a classification model with one output per label.

    The likelihood is a product of Bernoulli distributions: log p(y) = sum_k log p(y_k), and p(y_k = 1) is the logistic
    function of output k. Given the model, labels are independent. Rows are ``{"text": str, "labels": [name, ...]}``. A
    table without lists has one field of 0 and 1 per label, ``target=("red", "blue")``. Predictions are
    :class:`~scalabl_pyro.prediction.label_sets.LabelSetPrediction`.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        classes: Names of the labels, in the order of the model's outputs. Default: the names of the fields of 0 and 1.
        text: Name of the field of the text.
        text_pair: Name of the field of a second text. Default: there is none.
        target: Name of the field that lists the labels of a row, by name or index, or one name of a field per label.
        max_length: Number of tokens of the longest text. A longer text loses its end.
        windows: ``"logits"`` reads a longer text as windows, see :class:`~scalabl_pyro.SequenceClassification`.
        overlap: Number of tokens that a window shares with the one before it.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: There are fewer than two labels, two of them have one name, or their number is not that of fields.

    Example:
        >>> from scalabl_pyro.tasks import MultiLabelClassification
        >>> task = MultiLabelClassification(tokenizer, classes=["red", "green", "blue"])
        >>> task.encode({"text": "the sky is blue", "labels": ["blue", "red"]}).target
        (1, 0, 1)
    """

    options = ("classes", *TextTask.options)
    target: Any

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        classes: Sequence[ClassName] | None = None,
        text: str = "text",
        text_pair: str | None = None,
        target: str | Sequence[str] = "labels",
        max_length: int | None = None,
        windows: Literal["logits"] | None = None,
        overlap: int = 0,
    ) -> None:
        limits: dict[str, Any] = {"max_length": max_length, "windows": windows, "overlap": overlap}
        super().__init__(tokenizer, text=text, text_pair=text_pair, target="labels", **limits)
        fields = [target] if isinstance(target, str) else list(target)
        for name in fields:
            check_column("target", name)
        self.target = target if isinstance(target, str) else tuple(fields)
        if classes is None and isinstance(target, str):
            raise ValueError("classes= is missing: name the labels, such as ['red', 'blue'], or use tasks.from_data.")
        self.classes: tuple[ClassName, ...] = as_classes(fields if classes is None else classes)
        if not isinstance(target, str) and len(fields) != len(self.classes):
            raise ValueError(f"target= names {len(fields)} fields for {len(self.classes)} classes: give one per class.")

    @property
    def num_answers(self) -> int:
        """Number of fields of the answer, which stand last in :attr:`row_fields`."""
        return 1 if isinstance(self.target, str) else len(self.target)

    @property
    def row_fields(self) -> Sequence[str]:  # type: ignore[override]
        """Names of the fields of a row."""
        answers = (self.target,) if isinstance(self.target, str) else self.target
        return [name for name in (self.text, self.text_pair, *answers) if name is not None]

    def answer_of(self, row: Row) -> tuple[int, ...] | None:
        """Return 0 or 1 per label; None if the row has no answer."""
        if not isinstance(self.target, str):
            return self._from_fields(row)
        value = row.get(self.target)
        if is_missing(value):
            return None
        if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
            raise ValueError(
                f"the field {self.target!r} holds {shown(value)}: give a list of labels, which may be empty, or one "
                "field of 0 and 1 per label, target=('red', 'blue')."
            )
        found = [class_index(label, self.classes) for label in value]
        if None in found:
            raise ValueError(f"the field {self.target!r} has a label without a value: {shown(list(value))}.")
        if len(set(found)) < len(found) and any(integer(label) is not None for label in value):
            raise ValueError(
                f"the field {self.target!r} holds {shown(list(value))}, which names a label twice by its number. If "
                "it marks each label by 0 or 1, give the names of the labels that have a 1, or one field per label, "
                "target=('red', 'blue')."
            )
        return tuple(int(k in found) for k in range(len(self.classes)))

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Build the distribution of the labels, with one event dimension."""
        if outputs.shape[-1] != len(self.classes):
            raise ValueError(
                f"The model's head has {outputs.shape[-1]} outputs, but the task has {len(self.classes)} labels. "
                f"Load the model with num_labels={len(self.classes)}."
            )
        return OwnBernoulli(logits=outputs).to_event(1)

    def _from_fields(self, row: Row) -> tuple[int, ...] | None:
        values = [row.get(name) for name in self.target]
        if all(is_missing(value) for value in values):
            return None
        numbers = [int(v) if isinstance(v := plain(value), bool) else integer(v) for value in values]
        for name, value, found in zip(self.target, values, numbers, strict=True):
            if found not in (0, 1):
                raise ValueError(f"the field {name!r} holds {shown(value)}: give 0 or 1, or True or False.")
        return tuple(number for number in numbers if number is not None)

    def _check_names(self, id2label: Any) -> None:
        check_model_names(self.classes, id2label)
