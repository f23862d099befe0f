"""Predictions of N rows under S draws: the answer, how uncertain it is, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import metrics
from .._arguments import known_arguments_of_methods
from ..data.labels import ClassName
from ..metrics import Array
from .answered import log_prob_of
from .from_draws import FromDensities, FromDraws
from .mixture import jackknife_entropy, normal_mixture_quantiles
from .scores import ClassScores, NumberScores


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class Prediction(FromDraws, ClassScores):
    """Class probabilities of N rows under S draws.

    Uncertainties are in nats: total = aleatoric + epistemic, or H[E p] = E H[p] + I (Depeweg et al., 2018). H is the
    entropy, E the mean over draws, and I the mutual information of answer and draw.

    Attributes:
        log_probs: (S, N, C) log probabilities of each draw; -inf for choices that a row lacks.
        target: (N,) class indices, -1 where a row has no answer; None if no row has one.
        classes: Names of the C classes.
        is_mean: Whether the only draw is the posterior mean (``num_draws=0``).
        seconds: Time that the prediction took.

    Example:
        >>> import numpy as np
        >>> Prediction(np.log([[[0.9, 0.1]], [[0.5, 0.5]]]), np.array([0]), ("yes", "no")).probs.round(2)
        array([[0.7, 0.3]])
    """

    PER_DRAW: ClassVar[tuple[str, ...]] = ("log_probs",)

    log_probs: Array
    target: NDArray[np.integer] | None
    classes: tuple[ClassName, ...]
    is_mean: bool = False
    seconds: float = float("nan")

    @property
    def probs(self) -> Array:
        """(N, C) probabilities averaged over draws."""
        return np.exp(self.log_probs, dtype=np.float64).mean(0)

    @property
    def aleatoric(self) -> Array:
        """(N,) entropy of a draw, averaged over draws, nats: the part that more data could not remove."""
        return metrics.entropy(np.exp(self.log_probs, dtype=np.float64)).mean(0)

    @property
    def epistemic_corrected(self) -> Array:
        """(N,) :attr:`epistemic` with its bias of order 1 / S removed by the jackknife over draws; NaN for one draw."""
        return np.maximum(jackknife_entropy(np.exp(self.log_probs, dtype=np.float64)) - self.aleatoric, 0.0)

    @property
    def log_likelihood(self) -> Array:
        """(S, N) log probability of the target under each draw, nats; NaN where a row has no answer."""
        return log_prob_of(self.log_probs, self.target)


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class NumericPrediction(FromDensities, NumberScores):
    """Predictive distribution of N numbers under S draws, for likelihoods that are not categorical.

    The predictive distribution of a row is the mixture of the likelihoods of its S draws, with equal weights.
    Uncertainties are variances and split by the law of total variance: total = aleatoric + epistemic.

    Attributes:
        means: (S, N) mean of each draw's likelihood.
        variances: (S, N) variance of each draw's likelihood.
        replicates: (S, N) one simulated answer per draw.
        log_density: (S, N) log density of the target, nats, NaN where a row has no answer; None if no row has one.
        target: (N,) numbers, NaN where a row has no answer; None if no row has one.
        is_mean: Whether the only draw is the posterior mean (``num_draws=0``).
        seconds: Time that the prediction took.
        is_normal: Whether each draw's likelihood is a normal distribution, so that means and variances define it.

    Example:
        >>> import numpy as np
        >>> one = np.zeros((1, 1))
        >>> NumericPrediction(one, one + 1, one, None, None, is_normal=True).interval(0.9).round(3)
        array([[-1.645,  1.645]])
    """

    PER_DRAW: ClassVar[tuple[str, ...]] = ("means", "variances", "replicates", "log_density")

    means: Array
    variances: Array
    replicates: Array
    log_density: Array | None
    target: Array | None
    is_mean: bool = False
    seconds: float = float("nan")
    is_normal: bool = False

    @property
    def mean(self) -> Array:
        """(N,) mean of the predictive mixture."""
        return self.means.mean(0)

    @property
    def aleatoric(self) -> Array:
        """(N,) variance of the likelihood, averaged over draws."""
        return self.variances.mean(0)

    @property
    def epistemic(self) -> Array:
        """(N,) variance of the S draws' means. That over the posterior is 1 / (1 - 1 / S) times as large on average."""
        return self.means.var(0)

    @property
    def epistemic_corrected(self) -> Array:
        """(N,) unbiased variance of the draws' means over the whole posterior (divided by S - 1); NaN for one draw."""
        return self.means.var(0, ddof=1) if len(self.means) > 1 else np.full(self.means.shape[1], np.nan)

    def interval(self, level: float = 0.9) -> Array:
        """Compute central predictive intervals: quantiles (1 - level) / 2 and (1 + level) / 2 of the mixture.

        Where the likelihood is normal, the quantiles solve mean_s Phi((x - mean_s) / sd_s) = p, so no sampling of
        answers adds error; what remains is the error of S draws in place of the whole posterior. Elsewhere they are
        quantiles of the S simulated answers. Their Monte Carlo error is sqrt(p (1 - p) / S) in probability: 0.015 for
        p = 0.05 and 200 draws, so that a nominal tail of 5 % holds between 3.5 % and 6.5 % (one standard error).

        Args:
            level: Probability inside the interval, between 0 and 1.

        Returns:
            (N, 2) lower and upper bounds.

        Raises:
            ValueError: If ``level`` is out of range, or if the likelihood is not normal and the S draws hold less than
                one answer per tail.
        """
        metrics.check_level(level)
        tails = ((1 - level) / 2, (1 + level) / 2)
        if self.is_normal:
            return np.stack([normal_mixture_quantiles(self.means, self.variances, p) for p in tails], axis=1)
        needed = int(np.ceil(2 / (1 - level) - 1e-9))
        if len(self.replicates) < needed:
            raise ValueError(
                f"interval(level={level}) needs {needed} draws or more, because the likelihood is not normal and the "
                f"interval comes from simulated answers; this prediction has {len(self.replicates)}. Predict with "
                f"num_draws={needed} or more."
            )
        return np.quantile(self.replicates.astype(np.float64), tails, axis=0).T

    def to_frame(self, data: Any = None, *, level: float = 0.9, review_above: float | None = None) -> pd.DataFrame:
        """Make a table of one line per row.

        Args:
            data: The rows that were predicted. Their columns then come first, and a DataFrame gives its index.
            level: Probability inside the predictive interval.
            review_above: Limit of ``sd``. The column ``needs_review`` tells whether the ``sd`` of a row is larger.

        Returns:
            Columns ``prediction`` (mean), ``sd`` (predictive standard deviation), ``total``, ``aleatoric`` and
            ``epistemic`` (variances), ``low`` and ``high`` (bounds of :meth:`interval`; NaN where the draws are too few
            for it), the columns that were asked for, and ``target`` where the answers are known.

        Raises:
            ValueError: ``data`` has another number of rows, or a column with one of these names, or a number is out of
                range.
        """
        try:
            bounds = self.interval(level)
        except ValueError:
            metrics.check_level(level)
            bounds = np.full((len(self.mean), 2), np.nan)
        return self._table(data, review_above, low=bounds[:, 0], high=bounds[:, 1])

    def _summary(self) -> Mapping[str, object]:
        likelihood = "normal" if self.is_normal else "not normal"
        facts = {"rows": self.means.shape[1], "draws": self.num_draws, "likelihood": likelihood}
        return {**facts, "answers": self._answers(), "seconds": self.seconds}
