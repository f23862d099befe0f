"""The task that assigns a number to a text, where some training answers may be far off."""

from typing import Any, cast

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._values import number, shown
from ..data.batch import Batch
from .regression import Regression
from .standardized import Standardized
from .text import single_output

#: Median absolute deviation of a standard normal distribution, inverted.
MAD_TO_SCALE = 1.4826022185056018


class StandardizedStudentT(Standardized, dist.StudentT):
    """Distribution of y = center + unit * z with z ~ StudentT(df, loc, scale), in the units of y.

    Args:
        df: Degrees of freedom, more than 2, so that the variance exists.
        loc: Mean of z, shape (...).
        scale: Scale of z, positive.
        center: Number that was subtracted.
        unit: Positive number that was divided by.

    Example:
        >>> d = StandardizedStudentT(4.0, torch.zeros(1), torch.ones(1), center=10.0, unit=2.0)
        >>> d.mean.item(), d.variance.item()
        (10.0, 8.0)
    """

    def __init__(self, df: float, loc: Tensor, scale: Tensor, *, center: float, unit: float) -> None:
        self.standard = dist.StudentT(df, loc, scale, validate_args=False)
        self.center = center
        self.unit = unit
        loc, scale = self._undo(self.standard.loc), self._scaled(self.standard.scale)
        dist.StudentT.__init__(self, df, loc, scale, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StandardizedStudentT":
        """Return the distribution with a larger batch shape."""
        df = float(self.standard.df.flatten()[0])
        loc, scale = (x.expand(torch.Size(batch_shape)) for x in (self.standard.loc, self.standard.scale))
        return StandardizedStudentT(df, loc, scale, center=self.center, unit=self.unit)


class RobustRegression(Regression):
    """Task that assigns a number y to a text, for a classification model with one output, with robust noise.

    The likelihood is y ~ StudentT(df, center + unit * output, noise_scale). Its tails are heavy, so that a few answers
    that are far off hardly move the model. ``center`` and ``unit`` are the median and the scaled median absolute
    deviation of the training targets. Everything else is as for :class:`~scalabl_pyro.Regression`.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        df: Degrees of freedom, more than 2. With more of them, the noise comes closer to a normal distribution.
        options: ``noise_scale`` (initial scale of the noise), ``standardize``, ``text``, ``text_pair``, ``target``,
            ``max_length``, ``windows="logits"`` and ``overlap``, as for :class:`~scalabl_pyro.Regression`.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: ``df`` is not a finite number above 2, or another option has a wrong value.

    Example:
        >>> from scalabl_pyro.tasks import RobustRegression
        >>> task = RobustRegression(tokenizer, df=4, target="price")  # any Hugging Face tokenizer
        >>> task.encode({"text": "the sky is blue", "price": 4}).target
        4.0
    """

    options = ("df", *Regression.options)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, df: float = 4.0, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        found = number(df)
        if found is None or not 2 < found < float("inf"):
            raise ValueError(f"df={shown(df)}: expected a finite number above 2, so that the variance exists.")
        self.df = found

    def likelihood(self, outputs: Tensor, batch: Batch) -> StandardizedStudentT:
        """Build the t distribution of y around the single output."""
        center, unit = self.mean_and_scale
        noise = cast(Tensor, self.noise_scale).to(outputs.dtype) / unit
        return StandardizedStudentT(self.df, single_output(outputs), noise, center=center, unit=unit)

    def _center_and_spread(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Return the median, and the scaled median absolute deviation, or the standard deviation where that is 0."""
        center = float(np.median(values))
        spread = MAD_TO_SCALE * float(np.median(np.abs(values - center)))
        return center, spread or float(values.std())
