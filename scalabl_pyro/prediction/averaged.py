"""Predictions of N rows, averaged over draws that were not kept: ``predict(..., keep_draws=False)``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._arguments import known_arguments_of_methods
from ..data.labels import ClassName
from ..metrics import Array
from .scores import ClassScores, NumberScores


class WithoutDraws:
    """Says of each attribute that needs single draws why it is not there."""

    #: Attributes of the prediction with draws that this one lacks.
    NOT_KEPT: ClassVar[tuple[str, ...]]

    def __getattr__(self, name: str) -> Any:
        if name in self.NOT_KEPT:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}, which needs single draws: keep_draws=False kept averages "
                f"over draws only. It lacks {', '.join(self.NOT_KEPT)}. Predict with keep_draws=True to have them.",
                name=name,
                obj=self,
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class AveragedPrediction(WithoutDraws, ClassScores):
    """Class probabilities of N rows, averaged over S draws that were not kept.

    Its values are those of :class:`~scalabl_pyro.Prediction` under the same draws. What needs single draws is not
    there: ``log_probs``, ``log_likelihood`` and ``epistemic_corrected``. So it cannot be exported to ArviZ, nor be
    scaled by a temperature.

    Attributes:
        probs: (N, C) probabilities averaged over draws.
        aleatoric: (N,) entropy of a draw, averaged over draws, nats: the part that more data could not remove.
        log_mixture: (N,) log of the averaged probability of the target, nats, NaN where a row has no answer; None if
            no row has one. It holds where probabilities are too small for floats.
        target: (N,) class indices, -1 where a row has no answer; None if no row has one.
        classes: Names of the C classes.
        num_draws: Number S of draws; 0 for the posterior mean.
        seconds: Time that the prediction took.

    Example:
        >>> averaged = posterior.predict(test_data, num_draws=100, keep_draws=False)
        >>> averaged.probs.shape == (len(test_data), len(averaged.classes))
        True
    """

    PER_ROW: ClassVar[tuple[str, ...]] = ("probs", "aleatoric", "log_mixture")
    NOT_KEPT: ClassVar[tuple[str, ...]] = ("log_probs", "log_likelihood", "epistemic_corrected")

    probs: Array
    aleatoric: Array
    log_mixture: Array | None
    target: NDArray[np.integer] | None
    classes: tuple[ClassName, ...]
    num_draws: int
    seconds: float = float("nan")


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class AveragedNumericPrediction(WithoutDraws, NumberScores):
    """Predictive distribution of N numbers, averaged over S draws that were not kept.

    Its values are those of :class:`~scalabl_pyro.NumericPrediction` under the same draws. What needs single draws is
    not there: ``means``, ``variances``, ``replicates``, ``log_density``, ``log_likelihood`` and ``interval``.

    Attributes:
        mean: (N,) mean of the predictive mixture.
        aleatoric: (N,) variance of the likelihood, averaged over draws.
        epistemic: (N,) variance of the S draws' means.
        log_mixture: (N,) log density of the target under the mixture, nats, NaN where a row has no answer; None if no
            row has one.
        target: (N,) numbers, NaN where a row has no answer; None if no row has one.
        num_draws: Number S of draws; 0 for the posterior mean.
        seconds: Time that the prediction took.

    Example:
        >>> import numpy as np
        >>> one = np.ones(1)
        >>> AveragedNumericPrediction(one, one, one, None, None, num_draws=100).total
        array([2.])
    """

    PER_ROW: ClassVar[tuple[str, ...]] = ("mean", "aleatoric", "epistemic", "log_mixture")
    NOT_KEPT: ClassVar[tuple[str, ...]] = (
        "means",
        "variances",
        "replicates",
        "log_density",
        "log_likelihood",
        "interval",
        "is_normal",
    )

    mean: Array
    aleatoric: Array
    epistemic: Array
    log_mixture: Array | None
    target: Array | None
    num_draws: int
    seconds: float = float("nan")

    @property
    def epistemic_corrected(self) -> Array:
        """(N,) unbiased variance of the draws' means over the whole posterior (divided by S - 1); NaN for one draw."""
        if self.num_draws < 2:
            return np.full(len(self.mean), np.nan)
        return self.epistemic * (self.num_draws / (self.num_draws - 1))

    def to_frame(self, data: Any = None, *, review_above: float | None = None) -> pd.DataFrame:
        """Make a table of one line per row.

        Args:
            data: The rows that were predicted. Their columns then come first, and a DataFrame gives its index.
            review_above: Limit of ``sd``. The column ``needs_review`` tells whether the ``sd`` of a row is larger.

        Returns:
            Columns ``prediction`` (mean), ``sd`` (predictive standard deviation), ``total``, ``aleatoric`` and
            ``epistemic`` (variances), the columns that were asked for, and ``target`` where the answers are known.
            Bounds of an interval need single draws, so ``low`` and ``high`` are not there.

        Raises:
            ValueError: ``data`` has another number of rows, or a column with one of these names, or the limit is not a
                number.
        """
        return self._table(data, review_above)

    def _summary(self) -> Mapping[str, object]:
        facts = {"rows": self._num_rows(), "draws": self.num_draws}
        return {**facts, "answers": self._answers(), "seconds": self.seconds}
