"""Rows whose answer is known: the part of a prediction that can be scored."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._arguments import known_arguments_of_methods
from .._display import Summarized
from ..data.labels import UNLABELED

logger = logging.getLogger(__name__)

NO_ANSWERS = "These rows have no answers, so nothing can be scored. Predict rows that have answers."


@known_arguments_of_methods
class Answered(Summarized):
    """A prediction of N rows, some of which may have no answer.

    ``target`` is None if no row has an answer. Otherwise -1 marks a class that is not known, and NaN a number that is
    not known.
    """

    #: Names of the arrays with shape (S, N, ...), and of those with shape (N, ...) besides ``target``.
    PER_DRAW: ClassVar[tuple[str, ...]] = ()
    PER_ROW: ClassVar[tuple[str, ...]] = ()
    #: Whether answers are classes, not numbers.
    HAS_CLASSES: ClassVar[bool]
    target: Any

    @property
    def is_answered(self) -> NDArray[np.bool_]:
        """(N,) whether the answer of a row is known."""
        if self.target is None:
            return np.zeros(self._num_rows(), dtype=bool)
        target = np.asarray(self.target)
        return target >= 0 if self.HAS_CLASSES else ~np.isnan(target)

    def with_answers(self) -> Self:
        """Return the prediction of the rows whose answer is known.

        Raises:
            ValueError: If no row has an answer.

        Example:
            >>> from scalabl_pyro import Prediction
            >>> half = Prediction(np.log([[[0.9, 0.1], [0.5, 0.5]]]), np.array([0, -1]), ("yes", "no"))
            >>> half.with_answers().target
            array([0])
        """
        known = self.is_answered
        if not known.any():
            raise ValueError(NO_ANSWERS)
        if known.all():
            return self
        kept = {name: value[:, known] for name in self.PER_DRAW if (value := getattr(self, name)) is not None}
        kept |= {name: value[known] for name in self.PER_ROW if (value := getattr(self, name)) is not None}
        whole: Any = self
        return replace(whole, target=np.asarray(self.target)[known], **kept)

    def _num_rows(self) -> int:
        """Number N of rows."""
        return getattr(self, self.PER_DRAW[0]).shape[1] if self.PER_DRAW else len(getattr(self, self.PER_ROW[0]))

    def _with_count(self, table: pd.DataFrame) -> pd.DataFrame:
        """Say of how many rows the metrics are, if they are not all rows."""
        known = self.is_answered
        if known.all():
            return table
        logger.warning("%d of %d rows have an answer: the metrics are those of these rows.", known.sum(), len(known))
        return table.assign(num_answered=int(known.sum()))

    def _answers(self) -> bool | str:
        """Whether all rows or no row has an answer, or how many have one."""
        known = self.is_answered
        return bool(known.all()) if known.all() or not known.any() else f"{known.sum()} of {len(known)}"


def join_targets(targets: Sequence[float | int | None], *, are_classes: bool) -> Any:
    """Return the targets of N rows as one array.

    Args:
        targets: Targets, None where a row has no answer.
        are_classes: Whether they are class indices.

    Returns:
        (N,) with -1 (classes) or NaN (numbers) where a row has no answer; None if no row has one.
    """
    if all(target is None for target in targets):
        return None
    return np.asarray([(UNLABELED if are_classes else np.nan) if target is None else target for target in targets])


def log_prob_of(log_probs: NDArray[Any], target: NDArray[np.integer] | None) -> NDArray[Any]:
    """Return the log probabilities (S, N) of classes (N,) out of (S, N, C); NaN where a class is not known (-1).

    Raises:
        ValueError: If no class is known.
    """
    known = np.zeros(0) if target is None else np.asarray(target) >= 0
    if target is None or not known.any():
        raise ValueError(NO_ANSWERS)
    chosen = np.take_along_axis(log_probs, np.maximum(target, 0)[None, :, None], axis=2)[..., 0]
    return chosen if known.all() else np.where(known, chosen, np.nan)
