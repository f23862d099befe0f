"""Which rows to answer without a person, so that the error rate of these answers is bounded."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .._arguments import known_arguments, known_arguments_of_methods
from .._display import Summarized
from .._errors import ScalaBLWarning, check_choice, check_count, is_number, stacklevel_outside
from ..data.labels import ClassName
from ..metrics import Array
from .inputs import check_classes, check_same_classes, check_scores

Doubt = Literal["max_prob", "entropy", "epistemic"] | Callable[[Any], Array]


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class AnswerRule(Summarized):
    """Tells which rows to answer without a person; see :func:`selective_answers`.

    Attributes:
        risk: Largest error rate of answered rows.
        delta: Probability that the calibration rows give a rule whose error rate is larger.
        score: Doubt that orders the rows.
        threshold: Rows with less doubt are answered; -inf answers no row, inf answers all.
        share: Share of the calibration rows that the rule answers.
        bound: Upper bound of the error rate of answered rows; NaN if none is answered.
        num_rows: Number of calibration rows.
        classes: Names of the classes.
    """

    risk: float
    delta: float
    score: Doubt
    threshold: float
    share: float
    bound: float
    num_rows: int
    classes: tuple[ClassName, ...]

    @property
    def guarantee(self) -> str:
        """What holds, in words."""
        return (
            "If calibration rows and new rows are independent draws of one distribution, then with a probability of "
            f"at least {1 - self.delta:g} over the {self.num_rows} calibration rows, the error rate of the new rows "
            f"that the rule answers is at most {self.risk:g}. A rule that answers no row keeps this, too."
        )

    def apply(self, prediction: Any) -> NDArray[np.bool_]:
        """Tell for each new row whether to answer it without a person.

        Args:
            prediction: Prediction of N new rows, with the classes of the calibration rows.

        Returns:
            (N,) True where the predicted class can be used, False where a person answers.

        Raises:
            TypeError: ``prediction`` is not a prediction of classes.
            ValueError: It has other classes, or the doubt is not one number per row.

        Example:
            >>> rule = AnswerRule(0.02, 0.05, "max_prob", 0.1, 0.5, 0.019, 1000, prediction.classes)
            >>> bool((rule.apply(prediction) == (prediction.probs.max(1) > 0.9)).all())
            True
        """
        check_classes("prediction", prediction)
        check_same_classes(prediction, self.classes)
        return doubt(prediction, self.score) < self.threshold

    def _summary(self) -> Mapping[str, object]:
        score = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", "own")
        facts = {"risk": self.risk, "delta": self.delta, "score": score, "threshold": self.threshold}
        return {**facts, "share": self.share, "bound": self.bound, "rows": self.num_rows}


@known_arguments
def selective_answers(
    calibration: Any,
    *,
    risk: float = 0.02,
    delta: float = 0.05,
    score: Doubt = "max_prob",
    num_thresholds: int = 10,
) -> AnswerRule:
    """Find the rows that the model may answer alone, so that at most a share ``risk`` of its answers is wrong.

    Learn then test: J thresholds stand between calibration rows whose ranks are fixed in advance. For each one, m rows
    have less doubt, and e of these are answered wrong. Given the threshold, e has the law Binomial(m, error rate), so
    the bound of Clopper and Pearson is exact. Each is computed for the probability 1 - delta / J, so that all J hold
    together with probability 1 - delta. The largest threshold whose bound is at most ``risk`` is taken.

    Args:
        calibration: Prediction of rows with answers that were neither trained on nor used for another choice, such as
            a temperature. Rows without an answer are left out.
        risk: Largest allowed error rate of answered rows, between 0 and 1.
        delta: Probability that the rule may break ``risk``, over calibration sets, between 0 and 1.
        score: Doubt that orders the rows: ``"max_prob"`` (1 - largest probability), ``"entropy"`` (of the prediction),
            ``"epistemic"``, or a function of a prediction that returns one number per row. Only how well it orders the
            rows counts.
        num_thresholds: Number J of thresholds. More of them come nearer to the largest possible share, but each bound
            must then hold with a higher probability.

    Returns:
        A rule. ``rule.apply(prediction)`` tells for each new row whether to answer it, and ``rule.guarantee`` says what
        holds. If no threshold keeps the risk, the rule answers no row, and a warning says so.

    Raises:
        TypeError: ``calibration`` is not a prediction of classes.
        ValueError: There are too few rows to show such a low risk even without an error; or an option is out of range.

    Example:
        >>> p = np.linspace(0.5, 0.99, 1000)
        >>> probs = np.stack([p, 1 - p], axis=1)
        >>> wrong = np.arange(1000) < 100  # the least certain rows
        >>> from scalabl_pyro import Prediction
        >>> calibration = Prediction(np.log(probs[None]), wrong.astype(int), ("yes", "no"))
        >>> selective_answers(calibration, risk=0.02).share
        0.836

    References:
        Angelopoulos et al., Learn then Test, 2021. Geifman and El-Yaniv, Selective Classification for Deep Neural
        Networks, 2017, lemma 3.1. Clopper and Pearson, 1934.
    """
    for name, value in {"risk": risk, "delta": delta}.items():
        if not is_number(value) or not 0 < value < 1:
            raise ValueError(f"{name}={value!r} must lie between 0 and 1.")
    check_count(num_thresholds=num_thresholds)
    check_classes("calibration", calibration)
    known = calibration.with_answers()
    doubts = doubt(known, score)
    wrong = known.probs.argmax(1) != np.asarray(known.target)
    each = delta / num_thresholds
    least = math.ceil(math.log(each) / math.log1p(-risk))
    if len(wrong) < least:
        raise ValueError(
            f"risk={risk} with delta={delta} and num_thresholds={num_thresholds} needs {least} calibration rows with "
            f"answers, even if none is answered wrong, and there are {len(wrong)}. Give more rows, or a larger risk."
        )
    limit, share, bound, best = -math.inf, 0.0, math.nan, 1.0
    for m in np.unique(np.linspace(least, len(wrong), num_thresholds).round().astype(int)):
        candidate = math.inf if m == len(wrong) else float(np.sort(doubts)[m])
        below = doubts < candidate  # fewer than m rows, if doubts tie
        found = upper_bound(int(wrong[below].sum()), int(below.sum()), each)
        best = min(best, found)
        if found <= risk:
            limit, share, bound = candidate, float(below.mean()), found
    if limit == -math.inf:
        warnings.warn(
            f"The rule answers no row: the lowest bound of the error rate is {best:.4f}, above risk={risk}. Give more "
            "calibration rows, a larger risk, or another score.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )
    return AnswerRule(risk, delta, score, limit, share, bound, len(wrong), tuple(known.classes))


def doubt(prediction: Any, score: Doubt) -> Array:
    """Compute the doubt of each row; higher means less certain."""
    if callable(score):
        found = np.asarray(score(prediction))
    else:
        check_choice("score", score, ("max_prob", "entropy", "epistemic"))
        if score == "max_prob":
            found = 1 - prediction.probs.max(1)
        else:
            found = prediction.total if score == "entropy" else prediction.epistemic
    check_scores(found, len(prediction.probs), what="The doubt")
    return found


def upper_bound(errors: int, rows: int, delta: float) -> float:
    """Compute the upper bound of an error rate that holds with probability 1 - delta (Clopper and Pearson, 1934).

    Args:
        errors: Number of wrong answers seen.
        rows: Number of answers seen.
        delta: Probability that the error rate is larger.
    """
    return 1.0 if errors == rows else float(stats.beta.ppf(1 - delta, errors + 1, rows - errors))
