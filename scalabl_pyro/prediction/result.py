"""What S draws say of N rows, as probabilities or moments: the answer, and how uncertain it is and why."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .. import metrics

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of N rows under S draws.

    Uncertainties are in nats and split as H[E p] = E H[p] + I: total = aleatoric + epistemic (Depeweg et al., 2018).

    Attributes:
        log_probs: (S, N, C) log probabilities of each draw; -inf for choices that a row lacks.
        target: (N,) class indices, or None.
        classes: names of the C classes.
        is_mean: whether the only draw is the posterior mean (``num_draws=0``).
        seconds: time the prediction took.
    """

    log_probs: Array
    target: NDArray[np.integer] | None
    classes: tuple[str, ...]
    is_mean: bool = False
    seconds: float = float("nan")

    @property
    def num_draws(self) -> int:
        """S; 0 for the posterior mean."""
        return 0 if self.is_mean else len(self.log_probs)

    @property
    def probs(self) -> Array:
        """(N, C) probabilities averaged over draws."""
        return np.exp(self.log_probs, dtype=np.float64).mean(0)

    @property
    def labels(self) -> NDArray[np.integer]:
        """(N,) most probable class."""
        return self.probs.argmax(1)

    @property
    def total(self) -> Array:
        """(N,) entropy of the averaged probabilities."""
        return metrics.entropy(self.probs)

    @property
    def aleatoric(self) -> Array:
        """(N,) entropy of a draw, averaged: what more data could not remove."""
        return metrics.entropy(np.exp(self.log_probs, dtype=np.float64)).mean(0)

    @property
    def epistemic(self) -> Array:
        """(N,) mutual information of answer and draw: where the draws disagree."""
        return np.maximum(self.total - self.aleatoric, 0.0)

    @property
    def log_likelihood(self) -> Array:
        """(S, N) log probability of the target under each draw."""
        return np.take_along_axis(self.log_probs, self._labeled()[None, :, None], axis=2)[..., 0]

    def metrics(self, *, bootstrap: int = 0, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Accuracy, NLL, calibration and selective-prediction metrics; see :mod:`scalabl_pyro.metrics`."""
        return metrics.classification_report(self.probs, self._labeled(), bootstrap=bootstrap, level=level, seed=seed)

    def to_frame(self) -> pd.DataFrame:
        """One line a row: predicted class, its probability, uncertainties, and the target where known."""
        frame = pd.DataFrame(
            {
                "prediction": np.asarray(self.classes, dtype=object)[self.labels],
                "probability": self.probs.max(1),
                "total": self.total,
                "aleatoric": self.aleatoric,
                "epistemic": self.epistemic,
            }
        )
        if self.target is not None:
            frame["target"] = np.asarray(self.classes, dtype=object)[self.target]
        return frame

    def _labeled(self) -> NDArray[np.integer]:
        if self.target is None:
            raise ValueError("These rows have no answers, so nothing can be scored: predict on rows that have them.")
        return self.target


@dataclass(frozen=True)
class NumericPrediction:
    """Predictive moments of N numbers under S draws, for likelihoods that are not categorical.

    Uncertainties are variances and split by the law of total variance: total = aleatoric + epistemic.

    Attributes:
        means: (S, N) mean of each draw's likelihood.
        variances: (S, N) its variance.
        replicates: (S, N) one simulated answer a draw.
        log_density: (S, N) log density of the target, or None.
        target: (N,) numbers, or None.
        is_mean: whether the only draw is the posterior mean (``num_draws=0``).
        seconds: time the prediction took.
    """

    means: Array
    variances: Array
    replicates: Array
    log_density: Array | None
    target: Array | None
    is_mean: bool = False
    seconds: float = float("nan")

    @property
    def num_draws(self) -> int:
        """S; 0 for the posterior mean."""
        return 0 if self.is_mean else len(self.means)

    @property
    def mean(self) -> Array:
        """(N,) predictive mean."""
        return self.means.mean(0)

    @property
    def total(self) -> Array:
        """(N,) predictive variance."""
        return self.aleatoric + self.epistemic

    @property
    def aleatoric(self) -> Array:
        """(N,) variance of the likelihood, averaged over draws."""
        return self.variances.mean(0)

    @property
    def epistemic(self) -> Array:
        """(N,) variance of the draws' means."""
        return self.means.var(0)

    @property
    def log_likelihood(self) -> Array:
        """(S, N) log density of the target under each draw."""
        if self.log_density is None:
            raise ValueError("These rows have no answers, so nothing can be scored: predict on rows that have them.")
        return self.log_density

    def metrics(self) -> pd.DataFrame:
        """RMSE, MAE and NLL (nats) of the predictive mixture, as one row ``value``."""
        log_mixture = np.logaddexp.reduce(self.log_likelihood, axis=0) - np.log(len(self.means))
        error = self.mean - cast(Array, self.target)
        row = {
            "rmse": float(np.sqrt((error**2).mean())),
            "mae": float(np.abs(error).mean()),
            "nll": float(-log_mixture.mean()),
        }
        return pd.DataFrame([row], index=["value"])
