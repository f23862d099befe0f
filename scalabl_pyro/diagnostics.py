"""Did the inference work? Findings with a number, a likely cause and a next step."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from arviz_stats.base import array_stats
from numpy.typing import NDArray
from scipy.special import logsumexp

from .predictive import NumericPrediction, Prediction
from .subspace import Subspace

Array = NDArray[Any]

#: Draws below which Pareto smoothing has no tail to fit.
MIN_DRAWS = 25


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        check: what.
        severity: ``"ok"``, ``"note"`` (worth knowing), ``"warning"`` or ``"error"``.
        value: the number it rests on.
        threshold: what the number is compared with; NaN where there is none.
        cause: what it likely means.
        advice: what to do next.
    """

    check: str
    severity: str
    value: float
    threshold: float
    cause: str
    advice: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, worst first."""

    findings: tuple[Finding, ...]

    @property
    def severity(self) -> str:
        """Of the worst finding."""
        return self.findings[0].severity

    def to_frame(self) -> pd.DataFrame:
        """One line a finding."""
        return pd.DataFrame([vars(finding) for finding in self.findings]).set_index("check")

    def __str__(self) -> str:
        lines = [f"{f.severity.upper():>7}  {f.check} = {f.value:.3g}: {f.cause} {f.advice}" for f in self.findings]
        return "\n".join(line.rstrip() for line in lines)


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


def psis_loo(log_likelihood: Array, *, log_p: Array | None, log_q: Array | None) -> LOO:
    """LOO from log likelihoods (S, N) of draws, corrected for draws of q instead of the posterior.

    Args:
        log_likelihood: (S, N), nats.
        log_p: (S,) log joint density of each draw; None for draws of the posterior itself (MCMC).
        log_q: (S,) log density of each draw under q.

    References:
        Magnusson et al., Bayesian leave-one-out cross-validation for large data, ICML 2019.
    """
    if len(log_likelihood) < MIN_DRAWS:
        raise ValueError(f"LOO needs {MIN_DRAWS} draws or more (100 and more are better), got {len(log_likelihood)}.")
    if not np.isfinite(log_likelihood).all():
        raise ValueError("LOO needs a log likelihood of each row under each draw; some are not finite.")
    if np.ptp(log_likelihood, axis=0).max() < 1e-6:
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


def _smooth(log_ratio: Array) -> tuple[Array, float]:
    """Pareto-smoothed, normalised log weights (S,) and k-hat: -inf where all weights are equal, NaN without a tail."""
    if np.ptp(log_ratio) < 1e-6:  # nothing to smooth
        return np.full_like(log_ratio, -np.log(len(log_ratio))), float("-inf")
    smoothed, k = log_ratio, float("nan")
    with np.errstate(all="ignore"), contextlib.suppress(ValueError):  # draws that repeat have no tail
        smoothed, k = array_stats.psislw(-log_ratio)  # ArviZ takes log likelihoods and turns their sign itself
    if not (np.isfinite(k) and np.isfinite(smoothed).all()):
        smoothed, k = log_ratio, float("nan")
    return smoothed - logsumexp(smoothed), float(k)


def pareto_k(log_weights: Array) -> tuple[float, float, float]:
    """k-hat of importance weights log p - log q (S,), its threshold, and the effective share of draws (0 to 1).

    References:
        Yao et al., Yes, but did it work? Evaluating variational inference, ICML 2018; Vehtari et al., Pareto smoothed
        importance sampling, JMLR 2024.
    """
    if not np.isfinite(log_weights).all():
        return float("nan"), good_k(len(log_weights)), float("nan")
    log_weights, k = _smooth(log_weights)
    return k, good_k(len(log_weights)), float(np.exp(-logsumexp(2 * log_weights)) / len(log_weights))


def good_k(num_draws: int) -> float:
    """Threshold of k-hat for S draws: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / np.log10(num_draws), 0.7)


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


def check_weights(log_weights: Array) -> list[Finding]:
    """How far q is from the posterior."""
    k, threshold, share = pareto_k(log_weights)
    severity = _grade(k, warning=threshold, error=1.0)
    cause, advice = "q is close to the posterior.", ""
    if severity != "ok":
        cause = (
            "q misses part of the posterior: the family is too narrow or not yet trained, or the model misspecified."
        )
        advice = "Train longer, try guide='full_covariance' or laplace(), and compare with mcmc() on a small model."
    found = [Finding("pareto_k", severity, k, threshold, cause, advice)]
    cause = "share of the draws that importance weighting would use."
    found.append(Finding("importance_share", "ok" if share > 0.1 else "note", share, 0.1, cause, ""))
    elbo = float(np.mean(log_weights))
    cause = "nats per data set, for comparing guides of one prior."
    return [*found, Finding("elbo", "ok" if np.isfinite(elbo) else "error", elbo, float("nan"), cause, "")]


def check_history(history: pd.DataFrame | None) -> list[Finding]:
    """Whether the loss still falls, against its Monte Carlo noise."""
    if history is None or len(history) < 30:
        return []
    tail = history["loss"].to_numpy()[-max(len(history) // 3, 20) :]
    steps = np.arange(len(tail)) - (len(tail) - 1) / 2
    slope = float(steps @ tail / (steps @ steps))
    noise = float(np.std(tail - tail.mean() - slope * steps, ddof=2) / np.sqrt(steps @ steps))
    z = slope / noise if noise > 0 else np.sign(slope) * float("inf") if slope else 0.0
    falling = not z > -3
    cause = "standard errors by which the loss still changes over the last third of the training."
    advice = "Train longer, or raise the learning rates of loc and scale." if falling else ""
    return [Finding("loss_slope", "warning" if falling else "ok", float(z), -3.0, cause, advice)]


def check_scales(draws: Array, prior_draws: Array, subspace: Subspace) -> list[Finding]:
    """Latents and layers whose posterior is a point, far too wide, or the prior; from draws (S, D) of both."""
    if not np.isfinite(draws).all():
        return [Finding("draws", "error", float("nan"), float("nan"), "draws of s are not finite.", "Train again.")]
    width, center = _width(prior_draws), np.median(prior_draws, 0)
    ratio = draws.std(0, ddof=1) / width
    shift = np.abs(draws.mean(0) - center) / width
    cause = "share of latents narrower than 1 % of the prior: point estimates in effect."
    advice = "Check scale_lr and kl_weight: few data rarely say that much."
    found = [_share("collapsed_latents", ratio < 1e-2, cause, advice, limit=0.5)]
    cause, advice = (
        "share of latents wider than ten times the prior.",
        "Lower scale_lr; gauge='free' lets scales drift.",
    )
    found.append(_share("exploded_latents", ratio > 10, cause, advice, limit=0.0))
    edges = np.cumsum([0, *subspace.ranks])
    spans = zip(subspace.names, edges[:-1], edges[1:], strict=True)
    idle = [n for n, a, b in spans if shift[a:b].mean() < 0.3 and np.abs(np.log(ratio[a:b])).mean() < 0.2]
    cause = "share of layers whose posterior is still the prior" + (f" (such as {idle[0]})." if idle else ".")
    advice = "The data say nothing about them: leave them out of target_modules, or train longer." if idle else ""
    return [*found, Finding("idle_layers", "note" if idle else "ok", len(idle) / len(subspace), 0.0, cause, advice)]


def check_drift(mean: Prediction | NumericPrediction, draws: Prediction | NumericPrediction) -> list[Finding]:
    """How far the prediction at the posterior mean is from the average over draws."""
    if isinstance(mean, Prediction) and isinstance(draws, Prediction):
        drift = float(0.5 * np.abs(mean.probs - draws.probs).sum(1).mean())
    elif isinstance(mean, NumericPrediction) and isinstance(draws, NumericPrediction):
        drift = float((np.abs(mean.mean - draws.mean) / np.sqrt(draws.total)).mean())
    else:
        return []
    far = not drift < 0.05
    cause = "distance (total variation, or standard deviations) of the prediction at the mean from that over draws."
    advice = "Report predictions over draws: num_draws=0 is another model here." if far else ""
    return [Finding("mean_vs_draws", "note" if far else "ok", drift, 0.05, cause, advice)]


def check_chains(s: Array, what: str) -> list[Finding]:
    """Agreement of the chains, or of the restarts (C, S, D)."""
    threshold = 1.01 if what == "chain" else 1.1
    if len(s) < 2:
        cause, advice = f"one {what} cannot tell whether it is stuck.", f"Run two {what}s or more."
        return [Finding("r_hat", "warning", float("nan"), threshold, cause, advice)]
    r_hat = max(float(array_stats.rhat(s[..., d])) for d in range(s.shape[-1]))
    severity = _grade(r_hat, warning=threshold, error=1.1 if what == "chain" else 2.0)
    cause = f"largest ratio of the spread over all {what}s to that within one."
    advice = "" if severity == "ok" else f"The {what}s disagree: run longer, or there are several modes."
    return [Finding("r_hat", severity, r_hat, threshold, cause, advice)]


def as_diagnosis(findings: Sequence[Finding]) -> Diagnosis:
    """Sort by severity; a value that is not a number is never called good."""
    order = ["error", "warning", "note", "ok"]
    unknown: dict[str, Any] = {
        "severity": "error",
        "cause": "could not be computed.",
        "advice": "Check the posterior and the data.",
    }
    honest = [replace(f, **unknown) if np.isnan(f.value) and f.severity == "ok" else f for f in findings]
    return Diagnosis(tuple(sorted(honest, key=lambda f: order.index(f.severity))))


def _grade(value: float, *, warning: float, error: float) -> str:
    """Severity of a value that should be small; NaN is an error."""
    if np.isnan(value) or value >= error:
        return "error"
    return "warning" if value >= warning else "ok"


def _share(check: str, where: Array, cause: str, advice: str, *, limit: float) -> Finding:
    share = float(np.mean(where))
    bad = share > limit
    return Finding(check, "warning" if bad else "ok", share, limit, cause, advice if bad else "")


def _width(draws: Array) -> Array:
    """A standard deviation that heavy tails do not upset."""
    low, high = np.quantile(draws, [0.158655, 0.841345], axis=0)
    return np.maximum((high - low) / 2, 1e-12)
