"""Importance weights p / q of draws, how far they can be trusted (Pareto k-hat), and leave-one-out by them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from . import arviz_data

Array = NDArray[Any]

#: Draws below which Pareto smoothing has no tail to fit: a fifth of the draws, which must be 5 or more.
MIN_DRAWS = 25
#: Spread of log weights, in nats, that is rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class LOO:
    """Leave-one-out cross-validation by Pareto-smoothed importance sampling.

    Attributes:
        elpd: expected log predictive density of a data set of this size, nats; higher is better.
        se: its standard error over rows.
        p: effective number of parameters.
        elpd_i: (N,) contribution of each row.
        pareto_k: (N,) diagnostic of each row; above ``good_k``, or NaN, its contribution is unreliable.
        good_k: threshold for this number of draws.
        bad_rows: share of rows whose contribution is unreliable.
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


@dataclass(frozen=True)
class LogWeights:
    """Densities of S draws of q under the joint model of N rows, nats.

    Attributes:
        log_likelihood: (S, N).
        log_prior: (S,).
        log_q: (S,); None for draws of the posterior itself, or of a family without a density.
        scale: size of the training set over N, where the rows are a part of it.
    """

    log_likelihood: Array
    log_prior: Array
    log_q: Array | None
    scale: float = 1.0

    @property
    def log_joint(self) -> Array:
        """(S,)."""
        return self.scale * self.log_likelihood.sum(1) + self.log_prior

    @property
    def log_weights(self) -> Array:
        """(S,) log p(y, s) - log q(s)."""
        if self.log_q is None:
            raise ValueError("This posterior has no density (MCMC draws, particles, a point): it has no weights.")
        return self.log_joint - self.log_q

    def elbo(self) -> float:
        """Monte Carlo estimate, nats per data set; NaN without a density."""
        return float("nan") if self.log_q is None else float(self.log_weights.mean())

    def pareto_k(self) -> tuple[float, float, float]:
        """See :func:`pareto_k`; NaN without a density."""
        if self.log_q is None:
            return float("nan"), float("nan"), float("nan")
        return pareto_k(self.log_weights)

    def loo(self) -> LOO:
        """See :func:`psis_loo`."""
        log_p = None if self.log_q is None else self.log_joint
        return psis_loo(self.log_likelihood, log_p=log_p, log_q=self.log_q)


def psis_loo(log_likelihood: Array, *, log_p: Array | None, log_q: Array | None) -> LOO:
    """LOO from log likelihoods (S, N) of draws, corrected for draws of q instead of the posterior.

    Args:
        log_likelihood: (S, N), nats.
        log_p: (S,) log joint density of each draw; None for draws of the posterior itself (MCMC).
        log_q: (S,) log density of each draw under q.

    Raises:
        ValueError: too few draws, log likelihoods that are not finite, or draws that all predict the same.

    References:
        Magnusson et al., Bayesian leave-one-out cross-validation for large data, ICML 2019.
    """
    check_num_draws("LOO", len(log_likelihood))
    if not np.isfinite(log_likelihood).all():
        raise ValueError("LOO needs a log likelihood of each row under each draw; some are not finite.")
    if np.ptp(log_likelihood, axis=0).max() < ROUNDING:
        raise ValueError(
            "All draws predict the same (a point, or factors that are still zero), so leaving a row out changes "
            "nothing: use held-out rows, or a guide with a spread."
        )
    correction = 0.0 if log_p is None or log_q is None else (log_p - log_q)[:, None]
    smoothed = [_smooth(log_ratio) for log_ratio in (correction - log_likelihood).T]
    log_weights, k = (np.stack(part, axis=-1) for part in zip(*smoothed, strict=True))
    elpd_i = logsumexp(log_weights + log_likelihood, axis=0)
    in_sample = logsumexp(log_likelihood, axis=0) - np.log(len(log_likelihood))
    return LOO(
        elpd=float(elpd_i.sum()),
        se=float(np.sqrt(len(elpd_i) * elpd_i.var())),
        p=float((in_sample - elpd_i).sum()),
        elpd_i=elpd_i,
        pareto_k=k,
        good_k=good_k(len(log_likelihood)),
    )


def pareto_k(log_weights: Array) -> tuple[float, float, float]:
    """k-hat of importance weights log p - log q (S,), its threshold, and the effective share of draws (0 to 1).

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
    """Threshold of k-hat for S draws: min(1 - 1 / log10 S, 0.7); 0 for 10 draws or fewer, which show no tail.

    References:
        Vehtari et al., Pareto smoothed importance sampling, JMLR 2024, section 3.2.
    """
    return min(1 - 1 / np.log10(max(num_draws, 10)), 0.7)


def check_num_draws(what: str, num_draws: int) -> None:
    """Raise ValueError unless there are draws enough to smooth their weights."""
    if num_draws < MIN_DRAWS:
        raise ValueError(f"{what} needs {MIN_DRAWS} draws or more (100 and more are better), got {num_draws}.")


def _smooth(log_ratio: Array) -> tuple[Array, float]:
    """Pareto-smoothed, normalized log weights (S,) and k-hat: -inf where all weights are equal, NaN without a tail."""
    if np.ptp(log_ratio) < ROUNDING:  # nothing to smooth
        return np.full_like(log_ratio, -np.log(len(log_ratio))), float("-inf")
    if _has_tail(log_ratio):
        with np.errstate(all="ignore"):
            smoothed, k = arviz_data.psislw(log_ratio)
        if np.isfinite(k) and np.isfinite(smoothed).all():
            return smoothed - logsumexp(smoothed), k
    return log_ratio - logsumexp(log_ratio), float("nan")


def _has_tail(log_ratio: Array) -> bool:
    """Whether a Pareto distribution can be fitted to the largest weights: 5 of them, all different.

    Weights of draws that repeat (a few particles) pass for a short tail otherwise, that is for a very good k.
    """
    num_draws = len(log_ratio)
    size = int(min(num_draws / 5, 3 * num_draws**0.5))
    return num_draws >= MIN_DRAWS and len(np.unique(np.sort(log_ratio)[-size:])) >= 5
