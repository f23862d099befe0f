"""The task that assigns a count to a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._errors import check_scale
from .._values import integer, number, shown
from ..data.batch import Batch
from .text import TextTask, single_output


class CountRegression(TextTask):
    """Task that assigns a count 0, 1, 2, ... to a text, for a classification model with one output.

    The likelihood is y ~ Poisson(mean_count * exp(output)). ``mean_count`` is the mean of the training counts, so that
    the output of a new head has the right size from the start. The variance of a Poisson distribution is its mean.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        mean_count: Positive rate at the output 0. None learns it from the training rows of the first fit, and keeps it
            from then on.
        options: ``text``, ``text_pair``, ``target``, ``max_length``, ``windows="logits"`` and ``overlap``, as for
            :class:`SequenceClassification`.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: ``mean_count`` is not a positive finite number.

    Example:
        >>> from scalabl_pyro.tasks import CountRegression
        >>> task = CountRegression(tokenizer, target="replies")  # any Hugging Face tokenizer
        >>> task.encode({"text": "the sky is blue", "replies": 4}).target
        4.0
    """

    options = ("mean_count", *TextTask.options)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, mean_count: float | None = None, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        if mean_count is not None:
            check_scale(mean_count=number(mean_count) or 0.0)
        self.mean_count = None if mean_count is None else float(mean_count)
        self._learns_mean = mean_count is None

    def parse_target(self, value: Any) -> float:
        """Convert a whole number from 0 on, or a text that holds one, to a float, whose log factorial is exact."""
        count = integer(number(value, from_text=True))
        if count is None or count < 0:
            raise ValueError(
                f"the answer {shown(value)} is not a count: give a whole number from 0 on, or leave it out in "
                "prediction."
            )
        return float(count)

    def prepare(self, targets: Sequence[float | int], *, are_all: bool) -> None:
        """Learn the mean of the training counts, if it is not known yet.

        Args:
            targets: Training counts.
            are_all: Whether these are all of them. A part of them teaches nothing, and the mean becomes 1.
        """
        if self.mean_count is None:
            # Half a count in all rows stands for zero, whose logarithm does not exist.
            mean = max(float(np.mean(targets)), 0.5 / len(targets))
            self.mean_count = mean if are_all else 1.0

    def restart(self) -> None:
        """Forget the mean that :meth:`prepare` learned."""
        if self._learns_mean:
            self.mean_count = None

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Poisson:
        """Build the Poisson distribution of the count."""
        return dist.Poisson((1.0 if self.mean_count is None else self.mean_count) * single_output(outputs).exp())
