"""Predictions of rows that have any number of labels each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, log_expit

from .. import metrics
from .._arguments import known_arguments_of_methods
from ..data.labels import ClassName
from ..metrics import Array
from .from_draws import FromDensities
from .mixture import log_mean_exp
from .row_table import beside_rows, needs_review
from .scores import Scores


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class LabelSetPrediction(FromDensities, Scores):
    """Probabilities of the K labels of N rows under S draws.

    Under one draw, the labels of a row are independent. Uncertainties are in nats and sums over the labels: total =
    aleatoric + epistemic, as for :class:`~scalabl_pyro.Prediction`. They leave out that draws tie labels together.

    Attributes:
        log_odds: (S, N, K) log odds of each label under each draw.
        log_density: (S, N) log probability of the answer, nats, NaN where a row has no answer; None if no row has one.
        target: (N, K) whether a row has a label, 0 or 1, and -1 where it has no answer; None if no row has one.
        classes: Names of the K labels.
        is_mean: Whether the only draw is the posterior mean (``num_draws=0``).
        seconds: Time that the prediction took.

    Example:
        >>> import numpy as np
        >>> odds = np.log([[[9.0, 1 / 9]]])
        >>> LabelSetPrediction(odds, None, None, ("red", "blue")).probs.round(2)
        array([[0.9, 0.1]])
    """

    HAS_CLASSES: ClassVar[bool] = True
    PER_DRAW: ClassVar[tuple[str, ...]] = ("log_odds", "log_density")

    log_odds: Array
    log_density: Array | None
    target: NDArray[np.integer] | None
    classes: tuple[ClassName, ...]
    is_mean: bool = False
    seconds: float = float("nan")

    @property
    def probs(self) -> Array:
        """(N, K) probability of each label, averaged over draws."""
        return expit(self.log_odds.astype(np.float64)).mean(0)

    @property
    def labels(self) -> NDArray[np.bool_]:
        """(N, K) whether the probability of a label is 1/2 or more."""
        chosen: NDArray[np.bool_] = np.greater_equal(self.probs, 0.5)
        return chosen

    @property
    def total(self) -> Array:
        """(N,) entropies of the averaged probabilities, summed over labels, nats."""
        return _entropies(self.probs)

    @property
    def aleatoric(self) -> Array:
        """(N,) entropies of a draw, summed over labels and averaged over draws, nats."""
        return _entropies(expit(self.log_odds.astype(np.float64))).mean(0)

    @property
    def epistemic(self) -> Array:
        """(N,) mutual information of each label and the draw, summed over labels, nats."""
        return np.maximum(self.total - self.aleatoric, 0.0)

    @property
    def is_answered(self) -> NDArray[np.bool_]:
        """(N,) whether the labels of a row are known."""
        if self.target is None:
            return np.zeros(self._num_rows(), dtype=bool)
        return np.asarray((np.asarray(self.target) >= 0).all(1))

    def to_frame(self, data: Any = None, *, review_above: float | None = None) -> pd.DataFrame:
        """Make a table of one line per row.

        Args:
            data: The rows that were predicted. Their columns then come first, and a DataFrame gives its index.
            review_above: Limit of the doubt, which is 1 - ``probability``. The column ``needs_review`` tells whether
                the doubt of a row is larger.

        Returns:
            Columns ``prediction`` (list of labels), ``probability`` (that these and no others are right), ``total``,
            ``aleatoric`` and ``epistemic`` (nats), ``p(NAME)`` per label, the column that was asked for, and ``target``
            (list of labels, or None) where answers are known.

        Raises:
            ValueError: ``data`` has another number of rows, or a column with one of these names, or the limit is not a
                number.
        """
        sign = np.where(self.labels, 1.0, -1.0)
        own = log_mean_exp(log_expit(self.log_odds.astype(np.float64) * sign).sum(-1))
        columns: dict[str, Any] = {"prediction": self._names(self.labels), "probability": np.exp(own)}
        columns |= {"total": self.total, "aleatoric": self.aleatoric, "epistemic": self.epistemic}
        columns |= {f"p({name})": self.probs[:, k] for k, name in enumerate(self.classes)}
        frame = pd.DataFrame(columns | needs_review(1 - np.exp(own), review_above, largest=1.0))
        if self.target is not None:
            names = self._names(np.asarray(self.target) == 1)
            known = self.is_answered
            shown = [row if is_known else None for row, is_known in zip(names, known, strict=True)]
            frame["target"] = pd.Series(shown, dtype=object)
        return beside_rows(frame, data)

    def _names(self, chosen: NDArray[np.bool_]) -> list[list[ClassName]]:
        return [[name for name, is_there in zip(self.classes, row, strict=True) if is_there] for row in chosen]

    def _report(self, scored: Self, **options: Any) -> pd.DataFrame:
        target, found = cast(Any, scored.target) == 1, scored.labels
        squares = (scored.probs - target) ** 2
        log_mixture = cast(Array, scored.log_mixture)

        def scores(rows: Any) -> dict[str, float]:
            right, both = found[rows] == target[rows], (found[rows] & target[rows]).sum(0)
            either = found[rows].sum(0) + target[rows].sum(0)
            per_label = 2 * both / np.maximum(either, 1)
            return {
                "accuracy": float(right.mean()),
                "subset_accuracy": float(right.all(1).mean()),
                "f1_micro": float(2 * both.sum() / max(either.sum(), 1)),
                "f1_macro": float(per_label.mean()),
                "nll": float(-log_mixture[rows].mean()),
                "brier": float(squares[rows].mean()),
            }

        return metrics.report(scores, len(target), **options)

    def _summary(self) -> Mapping[str, object]:
        facts = {"rows": self._num_rows(), "draws": self.num_draws, "labels": len(self.classes)}
        return {**facts, "answers": self._answers(), "seconds": self.seconds}


def _entropies(probs: Array) -> Array:
    """Return the entropies of binary probabilities, summed over the last dimension, nats."""
    return metrics.entropy(np.stack([probs, 1 - probs], axis=-1)).sum(-1)


def join_label_sets(targets: Any, num_labels: int) -> NDArray[np.integer] | None:
    """Return the labels of N rows as one array, (N, K), with -1 where a row has no answer; None if no row has one.

    Example:
        >>> join_label_sets([(1, 0), None], 2)
        array([[ 1,  0],
               [-1, -1]])
    """
    if all(target is None for target in targets):
        return None
    return np.asarray([(-1,) * num_labels if target is None else target for target in targets])
