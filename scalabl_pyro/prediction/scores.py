"""What a prediction tells of each row, from averages over draws: the answer, its uncertainty, and metrics."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import metrics
from .._arguments import known_arguments_of_methods
from .._errors import check_flag
from ..data.labels import ClassName
from ..metrics import Array
from .answered import Answered
from .row_table import beside_rows, needs_review


@known_arguments_of_methods
class Scores(Answered):
    """Metrics of a prediction of classes or of numbers.

    Subclasses define ``num_draws``, ``seconds``, ``log_mixture``, and ``_report``, which computes the metrics of rows
    that all have answers.
    """

    if TYPE_CHECKING:

        @property
        def num_draws(self) -> int:
            """Number S of draws; 0 for the posterior mean."""
            ...

        @property
        def seconds(self) -> float:
            """Time that the prediction took."""
            ...

        @property
        def log_mixture(self) -> Array | None:
            """(N,) log density of the target under the average over draws, nats; None if no row has a target."""
            ...

        def _report(self, scored: Self, **options: Any) -> pd.DataFrame:
            """Compute the metrics of rows that all have answers; see :meth:`metrics` for the options."""
            ...

    def metrics(self, *, bootstrap: int = 0, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Compute the metrics of the rows with answers.

        For classes: accuracy, NLL, calibration and selective prediction; see :mod:`scalabl_pyro.metrics`. For numbers:
        RMSE, MAE and NLL (nats) of the predictive mixture.

        Rows without an answer do not count. If there are such rows, the column ``num_answered`` says how many count.

        Args:
            bootstrap: Number of resamples of the rows behind ``low`` and ``high``; 0 for none.
            level: Coverage of the bootstrap intervals, between 0 and 1.
            seed: Seed of the resampling.

        Returns:
            Row ``value``, and with ``bootstrap`` also ``low`` and ``high``; one column per metric.

        Raises:
            ValueError: If the rows have no answers, or if an option is out of range.
        """
        return self._with_count(self._report(self.with_answers(), bootstrap=bootstrap, level=level, seed=seed))


@known_arguments_of_methods
class ClassScores(Scores):
    """Answers, uncertainties and metrics of a prediction of classes.

    Subclasses define ``probs`` (N, C), ``aleatoric`` (N,), ``target`` and ``classes``.
    """

    HAS_CLASSES: ClassVar[bool] = True
    target: NDArray[np.integer] | None

    if TYPE_CHECKING:

        @property
        def probs(self) -> Array:
            """(N, C) probabilities averaged over draws."""
            ...

        @property
        def aleatoric(self) -> Array:
            """(N,) entropy of a draw, averaged over draws, nats."""
            ...

        @property
        def classes(self) -> tuple[ClassName, ...]:
            """Names of the C classes."""
            ...

    @property
    def labels(self) -> NDArray[np.integer]:
        """(N,) most probable class of each row."""
        return self.probs.argmax(1)

    @property
    def total(self) -> Array:
        """(N,) entropy of the averaged probabilities, nats; biased low at few draws, see :attr:`epistemic`."""
        return metrics.entropy(self.probs)

    @property
    def epistemic(self) -> Array:
        """(N,) mutual information of answer and draw, nats: the part that comes from draws that disagree.

        It is low at few draws, and so is ``total``: the bias is -sum_c Var(p_c) / (2 S E p_c) + O(1 / S^2), a factor
        1 - 1 / S to this order, 10 % at 10 draws. :attr:`Prediction.epistemic_corrected` has a bias of order 1 / S^2
        only.
        """
        return np.maximum(self.total - self.aleatoric, 0.0)

    def _report(self, scored: Self, **options: Any) -> pd.DataFrame:
        options["log_likelihood"] = scored.log_mixture
        return metrics.classification_report(scored.probs, cast(Array, scored.target), **options)

    def to_frame(
        self, data: Any = None, *, class_probs: bool = False, review_above: float | None = None
    ) -> pd.DataFrame:
        """Make a table of one line per row.

        Args:
            data: The rows that were predicted. Their columns then come first, and a DataFrame gives its index.
            class_probs: Whether to add a column ``p(name)`` per class, with its averaged probability.
            review_above: Limit of the doubt, which is 1 - ``probability``. The column ``needs_review`` tells whether
                the doubt of a row is larger.

        Returns:
            Columns ``prediction`` (name of the most probable class), ``probability``, ``total``, ``aleatoric`` and
            ``epistemic`` (nats), the columns that were asked for, and ``target`` where answers are known.

        Raises:
            ValueError: ``data`` has another number of rows, or a column with one of these names, or the limit is not a
                number.

        Example:
            >>> import numpy as np
            >>> from scalabl_pyro import Prediction
            >>> found = Prediction(np.log([[[0.9, 0.1], [0.4, 0.6]]]), None, ("yes", "no"))
            >>> frame = found.to_frame([{"id": 7}, {"id": 8}], class_probs=True, review_above=0.3)
            >>> frame[["id", "prediction", "p(no)", "needs_review"]].round(2)
               id prediction  p(no)  needs_review
            0   7        yes    0.1         False
            1   8         no    0.6          True
        """
        check_flag(class_probs=class_probs)
        probs = self.probs
        review = needs_review(1 - probs.max(1), review_above, largest=1.0)
        each = {f"p({name})": probs[:, i] for i, name in enumerate(self.classes)} if class_probs else {}
        frame = pd.DataFrame(
            {
                "prediction": np.asarray(self.classes, dtype=object)[probs.argmax(1)],
                "probability": probs.max(1),
                "total": self.total,
                "aleatoric": self.aleatoric,
                "epistemic": self.epistemic,
                **each,
                **review,
            }
        )
        if self.target is not None:
            names = np.asarray([*self.classes, None], dtype=object)  # the last one for -1
            frame["target"] = names[self.target]
        return beside_rows(frame, data)

    def _summary(self) -> Mapping[str, object]:
        facts = {"rows": self._num_rows(), "draws": self.num_draws, "classes": len(self.classes)}
        return {**facts, "answers": self._answers(), "seconds": self.seconds}


@known_arguments_of_methods
class NumberScores(Scores):
    """Uncertainty and metrics of a prediction of numbers.

    Subclasses define ``mean``, ``aleatoric`` and ``epistemic``, each (N,), and ``target``.
    """

    HAS_CLASSES: ClassVar[bool] = False
    target: Array | None

    if TYPE_CHECKING:

        @property
        def mean(self) -> Array:
            """(N,) mean of the predictive mixture."""
            ...

        @property
        def aleatoric(self) -> Array:
            """(N,) variance of the likelihood, averaged over draws."""
            ...

        @property
        def epistemic(self) -> Array:
            """(N,) variance of the draws' means."""
            ...

    @property
    def total(self) -> Array:
        """(N,) variance of the predictive mixture."""
        return self.aleatoric + self.epistemic

    def _report(self, scored: Self, **options: Any) -> pd.DataFrame:
        log_mixture = cast(Array, scored.log_mixture)
        error = scored.mean - cast(Array, scored.target)

        def scores(rows: NDArray[np.integer] | slice) -> dict[str, float]:
            return {
                "rmse": float(np.sqrt((error[rows] ** 2).mean())),
                "mae": float(np.abs(error[rows]).mean()),
                "nll": float(-log_mixture[rows].mean()),
            }

        return metrics.report(scores, len(error), **options)

    def _table(self, data: Any, review_above: float | None, **more: Array) -> pd.DataFrame:
        """Make a table of mean, standard deviation, variances, more columns, and known target, one line per row."""
        sd = np.sqrt(self.total)
        columns = {"prediction": self.mean, "sd": sd, "total": self.total}
        more = {**more, **needs_review(sd, review_above)}
        frame = pd.DataFrame({**columns, "aleatoric": self.aleatoric, "epistemic": self.epistemic, **more})
        return beside_rows(frame if self.target is None else frame.assign(target=self.target), data)
