"""Sets of classes that hold the right class with a given probability: LAC and APS, for all rows or per class."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._arguments import known_arguments, known_arguments_of_methods
from .._display import Summarized
from .._errors import check_choice, check_flag
from .._process.random_state import derive_seed
from ..data.labels import ClassName
from ..metrics import Array, check_level
from .inputs import check_classes, check_same_classes
from .ranks import coverage_in_words, least_rows, threshold

Score = Literal["lac", "aps"]


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class ClassSets(Summarized):
    """A set of classes for each of N rows.

    Attributes:
        members: (N, C) whether a class is in the set of a row.
        classes: Names of the C classes.
        target: (N,) class indices, -1 where a row has no answer; None if no row has one.

    Example:
        >>> ClassSets(np.array([[True, False], [True, True]]), ("yes", "no"), np.array([0, 1])).names
        [('yes',), ('yes', 'no')]
    """

    members: NDArray[np.bool_]
    classes: tuple[ClassName, ...]
    target: NDArray[np.integer] | None

    @property
    def sizes(self) -> NDArray[np.integer]:
        """(N,) number of classes in each set."""
        return self.members.sum(1)

    @property
    def names(self) -> list[tuple[ClassName, ...]]:
        """Classes in the set of each row."""
        return [tuple(self.classes[i] for i in np.flatnonzero(row)) for row in self.members]

    def to_frame(self) -> pd.DataFrame:
        """Make a table with the columns ``set`` and ``size``, and ``target`` where answers are known."""
        frame = pd.DataFrame({"set": self.names, "size": self.sizes})
        if self.target is not None:
            frame["target"] = np.asarray([*self.classes, None], dtype=object)[self.target]
        return frame

    def metrics(self) -> pd.DataFrame:
        """Compute the share of sets that hold the right class, their mean size, and the share with one or no class.

        Rows without an answer do not count for ``coverage``, which is NaN if no row has one.
        """
        known = np.zeros(len(self.members), dtype=bool) if self.target is None else self.target >= 0
        held = self.members[known, np.asarray(self.target)[known]] if known.any() else np.array([np.nan])
        values = {
            "coverage": float(held.mean()),
            "mean_size": float(self.sizes.mean()),
            "single": float((self.sizes == 1).mean()),
            "empty": float((self.sizes == 0).mean()),
        }
        return pd.DataFrame(values, index=["value"])

    def _summary(self) -> Mapping[str, object]:
        return {"rows": len(self.members), "classes": len(self.classes), "mean_size": float(self.sizes.mean())}


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class SetRule(Summarized):
    """Turns probabilities into sets of classes; see :func:`prediction_sets`.

    Attributes:
        level: Least probability that a set holds the right class.
        score: ``"lac"`` or ``"aps"``.
        thresholds: (C,) largest score of a class in a set. Without ``by_class`` all are equal.
        classes: Names of the C classes.
        counts: (C,) number of calibration rows per class.
        by_class: Whether each class has a threshold of its own.
        allow_empty: Whether a set may be empty.
        seed: Seed of the random numbers of APS.
    """

    level: float
    score: Score
    thresholds: Array
    classes: tuple[ClassName, ...]
    counts: NDArray[np.integer]
    by_class: bool
    allow_empty: bool
    seed: int = 0

    @property
    def guarantee(self) -> str:
        """What holds, in words."""
        if self.by_class:
            return (
                "For each class: if a new row of this class and the calibration rows of this class are exchangeable, "
                f"its set holds the class with a probability of at least {self.level}. This probability is over "
                "calibration rows and new row together."
            )
        return (
            f"If a new row and the {self.counts.sum()} calibration rows are exchangeable, its set holds the right "
            f"class with a probability of at least {self.level}. "
            f"{coverage_in_words(int(self.counts.sum()), self.level)} It holds on average over rows, not for each kind "
            "of row."
        )

    def apply(self, prediction: Any, *, seed: int | None = None) -> ClassSets:
        """Make the sets of new rows. The set of a row does not depend on the other rows.

        Args:
            prediction: Prediction of new rows, with the classes of the calibration rows.
            seed: Seed of the random numbers of APS, one per row. ``"lac"`` has none. None means that of the
                calibration rows. With another one, the guarantee holds on average over seeds only.

        Raises:
            TypeError: ``prediction`` is not a prediction of classes.
            ValueError: It has other classes.

        Example:
            >>> rule = prediction_sets(prediction, level=0.8)
            >>> rule.apply(prediction).metrics()
        """
        check_classes("prediction", prediction)
        check_same_classes(prediction, self.classes)
        probs = prediction.probs
        members = class_scores(probs, self.score, seed=self.seed if seed is None else seed) <= self.thresholds
        if not self.allow_empty:
            members[np.arange(len(probs)), probs.argmax(1)] |= ~members.any(1)
        return ClassSets(members, self.classes, prediction.target)

    def _summary(self) -> Mapping[str, object]:
        kind = "per class" if self.by_class else "all rows"
        limits = np.unique(self.thresholds).round(4).tolist()
        rows = int(self.counts.sum())
        return {"level": self.level, "score": self.score, "for": kind, "thresholds": limits, "rows": rows}


@known_arguments
def prediction_sets(
    calibration: Any,
    *,
    level: float = 0.9,
    score: Score = "aps",
    by_class: bool = False,
    allow_empty: bool = True,
    seed: int = 0,
) -> SetRule:
    """Calibrate sets of classes that hold the right class with a probability of at least ``level``.

    Split conformal prediction: the threshold is the k-th smallest score of the n calibration rows, with
    k = ceil((n + 1) level). A set holds all classes whose score is at most the threshold.

    Args:
        calibration: Prediction of rows with answers that were not trained on. Rows without an answer are left out.
        level: Least probability that a set holds the right class, between 0 and 1.
        score: ``"lac"`` is 1 - p_c. Its sets are the smallest on average; hard rows may get too small ones. ``"aps"``
            is the sum of the probabilities of all classes above c, plus U p_c, where U is uniform per row. Its sets
            are larger, and grow where the model is unsure. U is a hash of the seed and the probabilities of the row:
            the score is then the same function on each row, so that the guarantee holds for each seed.
        by_class: Whether the level holds for each class by itself (Mondrian). Each class then needs enough rows.
        allow_empty: Whether a set may be empty. If not, an empty set gets the most probable class. The coverage is then
            larger than its law.
        seed: Seed of U.

    Returns:
        A rule. ``rule.apply(prediction)`` makes the sets of new rows, and ``rule.guarantee`` says what holds.

    Raises:
        TypeError: ``calibration`` is not a prediction of classes.
        ValueError: There are too few rows, in all or of a class; or an option is out of range.

    Example:
        >>> rule = prediction_sets(prediction, level=0.8, score="lac")
        >>> rule.level
        0.8

    References:
        LAC: Sadinle, Lei and Wasserman, Least Ambiguous Set-Valued Classifiers with Bounded Error Levels, 2019. APS:
        Romano, Sesia and Candès, Classification with Valid and Adaptive Coverage, 2020. Per class: Vovk, 2012.
    """
    check_level(level)
    check_choice("score", score, ("lac", "aps"))
    check_flag(by_class=by_class, allow_empty=allow_empty)
    check_classes("calibration", calibration)
    known = calibration.with_answers()
    probs, target = known.probs, np.asarray(known.target)
    scores = class_scores(probs, score, seed=seed)
    own = scores[np.arange(len(target)), target]
    counts = np.bincount(target, minlength=probs.shape[1])
    classes = tuple(known.classes)
    if by_class:
        _check_counts(counts, classes, level)
        limits = np.array([threshold(own[target == c], level) for c in range(len(classes))])
    else:
        limits = np.full(len(classes), threshold(own, level))
    return SetRule(level, score, limits, classes, counts, by_class, allow_empty, seed)


def class_scores(probs: Array, score: Score, *, seed: int) -> Array:
    """Compute the score of each class in each row; higher means that the class conforms less.

    A class with probability 0, such as a choice that a row lacks, has the score infinity.

    Args:
        probs: (N, C) probabilities.
        score: ``"lac"`` or ``"aps"``, see :func:`prediction_sets`.
        seed: Seed of the uniform numbers of APS, see :func:`uniform_of`.

    Returns:
        (N, C) scores.
    """
    if score == "lac":
        found = 1 - probs
    else:
        order = np.argsort(-probs, axis=1, kind="stable")
        ordered = np.take_along_axis(probs, order, axis=1)
        above = np.cumsum(ordered, axis=1) - ordered
        uniform = uniform_of(probs, seed=seed)[:, None]
        found = np.empty_like(probs)
        np.put_along_axis(found, order, above + uniform * ordered, axis=1)
    return np.where(probs > 0, found, np.inf)


def uniform_of(probs: Array, *, seed: int) -> Array:
    """Compute a number for each row from its probabilities, which looks uniform over rows.

    Numbers by the place of a row would be no function of the row: with one seed, a row that is predicted alone would
    always get the first number, and its set would be too small or too large each time.

    Args:
        probs: (N, C) probabilities. Three decimals of their logarithms count, so that rounding rarely does.
        seed: Seed of the function.

    Returns:
        (N,) numbers in [0, 1).

    Example:
        >>> uniform_of(np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]), seed=0).round(3)
    """
    key = str(derive_seed(seed, "conformal: rows")).encode()
    with np.errstate(divide="ignore"):
        rounded = np.round(np.log(np.asarray(probs, dtype=np.float64)), 3) + 0.0  # -0 becomes 0
    numbers = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in rounded]
    return np.array([int.from_bytes(one, "little") >> 11 for one in numbers], dtype=np.float64) / 2**53


def _check_counts(counts: NDArray[np.integer], classes: tuple[ClassName, ...], level: float) -> None:
    needed = least_rows(level)
    if few := {name: int(count) for name, count in zip(classes, counts, strict=True) if count < needed}:
        missing = [name for name, count in few.items() if count == 0]
        absent = f" No calibration row has the class {', '.join(map(repr, missing))}." if missing else ""
        raise ValueError(
            f"by_class=True with level={level} needs {needed} calibration rows of each class, and these have fewer: "
            f"{few}.{absent} Give more rows of these classes, lower the level, or use by_class=False."
        )
