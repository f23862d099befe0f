"""Importance weights p / q of draws, their reliability (Pareto k-hat), and leave-one-out cross-validation with them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from .._display import Summarized
from .._errors import check_count
from ..metrics import Array
from . import arviz_data

#: Smallest number of draws for Pareto smoothing: the tail is a fifth of them, and must have 5 or more.
MIN_DRAWS = 25
#: Spread of log weights, in nats, below which it is only rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, repr=False)
class LOO(Summarized):
    """Leave-one-out cross-validation by Pareto-smoothed importance sampling.

    Attributes:
        elpd: Expected log predictive density of a data set of this size, nats; higher is better.
        se: Standard error of ``elpd`` over rows.
        p: Effective number of parameters: log density of the rows under the posterior, in sample, minus ``elpd``.
            Where draws come from q, both terms weigh them by p / q. It is negative only where these weights fail.
        elpd_i: (N,) contribution of each row, nats.
        pareto_k: (N,) diagnostic of each row. Above ``good_k``, or NaN, the contribution is unreliable.
        good_k: Threshold of ``pareto_k`` for this number of draws.
        bad_rows: Share of rows whose contribution is unreliable.

    Example:
        >>> LOO(-3.0, 0.5, 1.0, np.full(2, -1.5), np.array([0.1, 0.9]), 0.7).bad_rows
        0.5
    """

    elpd: float
    se: float
    p: float
    elpd_i: Array
    pareto_k: Array
    good_k: float

    @property
    def bad_rows(self) -> float:  # noqa: D102  # described with the attributes
        return float(np.mean(~(self.pareto_k <= self.good_k)))

    def _summary(self) -> Mapping[str, object]:
        facts = {"elpd": self.elpd, "se": self.se, "p": self.p, "rows": len(self.elpd_i)}
        return {**facts, "good_k": self.good_k, "bad_rows": self.bad_rows}


@dataclass(frozen=True, repr=False)
class LogWeights(Summarized):
    """Densities of S draws of q under the joint model of N rows, nats.

    Attributes:
        log_likelihood: (S, N) log likelihood of each row under each draw.
        log_prior: (S,) log density of each draw under the prior.
        log_q: (S,) log density of each draw under q; None for MCMC draws and families without a density.
        scale: Size of the training set divided by N, where the rows are a part of it.

    Example:
        >>> LogWeights(np.zeros((2, 3)), np.array([-1.0, -2.0]), np.array([0.0, 0.0])).elbo()
        -1.5
    """

    log_likelihood: Array
    log_prior: Array
    log_q: Array | None
    scale: float = 1.0

    @property
    def log_joint(self) -> Array:
        """(S,) log density of data and draw, nats."""
        return self.scale * self.log_likelihood.sum(1) + self.log_prior

    @property
    def log_weights(self) -> Array:
        """(S,) log p(y, s) - log q(s), nats."""
        if self.log_q is None:
            raise ValueError(
                "MCMC draws, particles and points have no density, so they have no importance weights. Use a posterior "
                "whose guide has a density, such as guide='normal'."
            )
        return self.log_joint - self.log_q

    def elbo(self) -> float:
        """Estimate the ELBO by Monte Carlo, nats per data set; NaN without a density."""
        return float("nan") if self.log_q is None else float(self.log_weights.mean())

    def pareto_k(self) -> tuple[float, float, float]:
        """Compute :func:`pareto_k` of the weights; NaN without a density."""
        if self.log_q is None:
            return float("nan"), float("nan"), float("nan")
        return pareto_k(self.log_weights)

    def loo(self) -> LOO:
        """Compute :func:`psis_loo` of these draws."""
        log_p = None if self.log_q is None else self.log_joint
        return psis_loo(self.log_likelihood, log_p=log_p, log_q=self.log_q)

    def _summary(self) -> Mapping[str, object]:
        draws, rows = self.log_likelihood.shape
        return {"draws": draws, "rows": rows, "elbo": self.elbo(), "scale": float(self.scale)}


def psis_loo(log_likelihood: Array, *, log_p: Array | None, log_q: Array | None) -> LOO:
    """Compute LOO from draws, corrected for draws that come from q and not from the posterior.

    Args:
        log_likelihood: (S, N) log likelihood of each row under each draw, nats.
        log_p: (S,) log joint density of each draw; None for draws of the posterior itself (MCMC).
        log_q: (S,) log density of each draw under q.

    Raises:
        ValueError: If there are fewer than 25 draws, if log likelihoods are not finite, or if all draws predict the
            same.

    References:
        Magnusson et al., Bayesian leave-one-out cross-validation for large data, ICML 2019.
    """
    check_num_draws("LOO", len(log_likelihood))
    if not np.isfinite(log_likelihood).all():
        raise ValueError(
            "LOO needs a finite log likelihood of each row under each draw, but some are NaN or infinite. Look for "
            "rows whose answer has the probability 0, and check the fit by diagnose()."
        )
    if np.ptp(log_likelihood, axis=0).max() < ROUNDING:
        raise ValueError(
            "All draws predict the same, so leaving a row out changes nothing. The guide is a point, or the factors "
            "are still zero. Use held-out rows, or a guide with a spread."
        )
    correction = np.zeros(len(log_likelihood)) if log_p is None or log_q is None else log_p - log_q
    smoothed = [_smooth(log_ratio) for log_ratio in (correction[:, None] - log_likelihood).T]
    log_weights, k = (np.stack(part, axis=-1) for part in zip(*smoothed, strict=True))
    elpd_i = logsumexp(log_weights + log_likelihood, axis=0)
    in_sample = logsumexp(_smooth(correction)[0][:, None] + log_likelihood, axis=0)
    return LOO(
        elpd=float(elpd_i.sum()),
        se=float(np.sqrt(len(elpd_i) * elpd_i.var())),
        p=float((in_sample - elpd_i).sum()),
        elpd_i=elpd_i,
        pareto_k=k,
        good_k=good_k(len(log_likelihood)),
    )


def pareto_k(log_weights: Array) -> tuple[float, float, float]:
    """Compute k-hat of importance weights log p - log q (S,), its threshold, and the effective share of draws (0 to 1).

    k-hat is -inf where all weights are equal, and NaN where it cannot be fitted: weights that are not finite, fewer
    than 25 draws, draws that repeat, or a spread beyond the range of floats.

    References:
        Yao et al., Yes, but did it work? Evaluating variational inference, ICML 2018; Vehtari et al., Pareto smoothed
        importance sampling, JMLR 2024.
    """
    if not np.isfinite(log_weights).all():
        return float("nan"), good_k(len(log_weights)), float("nan")
    log_weights, k = _smooth(log_weights)
    return k, good_k(len(log_weights)), float(np.exp(-logsumexp(2 * log_weights)) / len(log_weights))


def good_k(num_draws: int) -> float:
    """Compute the threshold of k-hat for S draws: min(1 - 1 / log10 S, 0.7); 0 for 10 draws or fewer.

    References:
        Vehtari et al., Pareto smoothed importance sampling, JMLR 2024, section 3.2.

    Example:
        >>> float(good_k(100))
        0.5
    """
    return min(1 - 1 / np.log10(max(num_draws, 10)), 0.7)


def check_num_draws(what: str, num_draws: int) -> None:
    """Raise ValueError unless there are enough draws to smooth their weights."""
    check_count(num_draws=num_draws)
    if num_draws < MIN_DRAWS:
        raise ValueError(f"{what} needs {MIN_DRAWS} draws or more (100 and more are better), got {num_draws}.")


def _smooth(log_ratio: Array) -> tuple[Array, float]:
    """Compute smoothed, normalized log weights (S,) and k-hat: -inf where all weights are equal, NaN without a tail."""
    if np.ptp(log_ratio) < ROUNDING:  # nothing to smooth
        return np.full_like(log_ratio, -np.log(len(log_ratio))), float("-inf")
    if _has_tail(log_ratio):
        with np.errstate(all="ignore"):
            smoothed, k = arviz_data.psislw(log_ratio)
        if np.isfinite(k) and np.isfinite(smoothed).all():
            return smoothed - logsumexp(smoothed), k
    return log_ratio - logsumexp(log_ratio), float("nan")


def _has_tail(log_ratio: Array) -> bool:
    """Tell whether a Pareto distribution can be fitted to the largest weights: it takes 5 different ones.

    Otherwise the weights of draws that repeat (a few particles) look like a short tail, hence like a very good k.
    """
    num_draws = len(log_ratio)
    size = int(min(num_draws / 5, 3 * num_draws**0.5))
    return num_draws >= MIN_DRAWS and len(np.unique(np.sort(log_ratio)[-size:])) >= 5
