"""The task that assigns a number to a text."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints, transform_to
from transformers import PreTrainedTokenizerBase

from .._errors import ScalaBLWarning, check_scale, stacklevel_outside
from .._values import number, shown
from ..data.batch import Batch
from .standardized_normal import StandardizedNormal
from .text import TextTask, single_output

#: Mean and standard deviation at which a new head can learn targets that are not standardized.
LARGEST_RAW = 10.0


class Regression(TextTask):
    """Task that assigns a number y to a text, for a classification model with one output.

    The likelihood is y ~ Normal(mean + scale * output, noise_scale). ``mean`` and ``scale`` are the mean and the
    standard deviation of the training targets, so that the output of a new head has the right size from the start.
    Predictions, densities and ``noise_scale`` are in units of y, and ``noise_scale`` is learned. Rows are
    ``{"text": str, "label": float}``; the names of the fields are options.

    Args:
        tokenizer: A Hugging Face tokenizer with a pad token.
        noise_scale: Initial standard deviation of the noise, in units of y. Default: ``scale``.
        standardize: True learns ``mean`` and ``scale`` from the training rows of the first fit, and keeps them from
            then on: the attribute becomes ``(mean, scale)``. A pair ``(mean, scale)`` sets them. False means (0, 1).
        options: ``text``, ``text_pair``, ``target``, ``max_length``, ``windows="logits"`` and ``overlap``, as for
            :class:`SequenceClassification`.

    Raises:
        TypeError: ``tokenizer`` is not a Hugging Face tokenizer.
        ValueError: ``noise_scale`` is not a positive finite number, or ``standardize`` is neither a truth value nor a
            pair of a finite and a positive number.

    Example:
        >>> from scalabl_pyro import Regression
        >>> task = Regression(tokenizer, target="stars", noise_scale=0.5)  # any Hugging Face tokenizer
        >>> task.encode({"text": "the sky is blue", "stars": 4}).target
        4.0
    """

    options = ("noise_scale", "standardize", *TextTask.options)
    added_options: ClassVar[Mapping[str, Any]] = {**TextTask.added_options, "standardize": False}

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        noise_scale: float | None = None,
        standardize: bool | tuple[float, float] = True,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if noise_scale is not None and not 0 < (number(noise_scale) or 0.0) < float("inf"):
            raise ValueError(f"noise_scale={noise_scale!r}: a standard deviation must be a positive finite number.")
        if noise_scale is not None:
            check_scale(noise_scale=number(noise_scale) or 0.0)
        self.standardize = _as_pair(standardize)
        self._learns_units = self.standardize is True
        self._follows_scale = noise_scale is None
        initial = self.mean_and_scale[1] if noise_scale is None else float(noise_scale)
        self.noise_scale: Tensor | PyroParam = PyroParam(torch.tensor(initial), constraints.positive)

    @property
    def mean_and_scale(self) -> tuple[float, float]:
        """Mean and scale that the likelihood adds to the output; (0, 1) as long as they are not known."""
        return (0.0, 1.0) if isinstance(self.standardize, bool) else self.standardize

    def parse_target(self, value: Any) -> float:
        """Convert a number, or a text that holds one, to a float."""
        found = number(value, from_text=True)
        if found is None:
            is_comma = isinstance(value, str) and number(value.replace(",", ".", 1), from_text=True) is not None
            hint = " Numbers have a decimal point: read the file with pandas.read_csv(path, decimal=',')." * is_comma
            raise ValueError(
                f"the answer {shown(value)} is not a number. Give a number, or leave it out in prediction.{hint}"
            )
        return found

    @torch.no_grad()
    def prepare(self, targets: Sequence[float | int], *, are_all: bool) -> None:
        """Learn mean and scale of the training targets, if they are not known yet.

        A warning is given where the targets do not fit the mean and scale that the task has already.

        Args:
            targets: Training targets, in units of y.
            are_all: Whether these are all of them. A part of them teaches nothing: its mean is not that of all rows.

        Raises:
            ValueError: Their standard deviation is too large or too small for float32.
        """
        values = np.asarray(targets, dtype=np.float64)
        with np.errstate(over="ignore"):
            mean, spread = self._center_and_spread(values)
        if self.standardize is True and are_all:
            scale = spread if spread > 1e-12 * max(abs(mean), 1e-300) else 1.0  # all targets are equal
            if not 0 < float(torch.tensor(scale)) < float("inf"):
                raise ValueError(
                    f"The training targets have the standard deviation {scale:.4g}, which float32 cannot hold. Give "
                    "them in another unit, such as thousands."
                )
            self.standardize = (mean, scale)
            if self._follows_scale:
                parameter = cast(Tensor, self.noise_scale_unconstrained)
                parameter.copy_(transform_to(constraints.positive).inv(torch.tensor(scale)))
            return
        if self.standardize is True:
            self.standardize = False
        self._check_units(mean, spread)

    def restart(self) -> None:
        """Forget the mean and scale that :meth:`prepare` learned."""
        if self._learns_units:
            self.standardize = True

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.Normal:
        """Build the normal distribution of y around the single output."""
        mean, scale = self.mean_and_scale
        # The scale has the precision of the outputs; otherwise a float64 model would get float32 log densities.
        noise = cast(Tensor, self.noise_scale).to(outputs.dtype) / scale
        return StandardizedNormal(single_output(outputs), noise, center=mean, unit=scale)

    def _center_and_spread(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Return the mean and the scale by which training targets are standardized."""
        return float(values.mean()), float(values.std())

    def _check_units(self, mean: float, spread: float) -> None:
        """Warn if a head cannot reach targets with this mean and standard deviation."""
        center, unit = self.mean_and_scale
        raw = isinstance(self.standardize, bool)
        limit = LARGEST_RAW if raw else 2.0
        is_narrow = not raw and 0 < spread < unit / 20
        if abs(mean - center) <= limit * unit and spread <= limit * unit and not is_narrow:
            return
        known = "standardize=False" if raw else f"the task has the mean {center:.4g} and the scale {unit:.4g}"
        warnings.warn(
            f"The training targets have the mean {mean:.4g} and the standard deviation {spread:.4g}, but {known}. The "
            f"model may learn nothing. Pass a new Regression(..., standardize=({mean:.4g}, {spread:.4g})).",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )


def _as_pair(standardize: Any) -> bool | tuple[float, float]:
    if isinstance(standardize, bool):
        return standardize
    pair = tuple(map(number, standardize)) if isinstance(standardize, list | tuple) else ()
    if len(pair) != 2 or None in pair or not np.isfinite(cast(Any, pair)).all() or not cast(Any, pair)[1] > 0:
        raise ValueError(
            f"standardize={standardize!r}: expected True, False, or a pair (mean, scale) of a finite and a positive "
            "number."
        )
    return cast(tuple[float, float], pair)
