"""Checks whether an inference worked: findings with a number, a likely cause and a next step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from arviz_stats.base import array_stats

from .._display import Summarized
from ..lora.subspace import Subspace
from ..metrics import Array
from ..prediction.result import NumericPrediction, Prediction
from .psis import LOO, LogWeights, good_k, pareto_k, psis_loo

__all__ = [
    "LOO",
    "Diagnosis",
    "Finding",
    "LogWeights",
    "as_diagnosis",
    "check_chains",
    "check_drift",
    "check_history",
    "check_scales",
    "check_weights",
    "good_k",
    "pareto_k",
    "psis_loo",
]

Severity = Literal["error", "warning", "note", "ok"]
"""Words for how bad a finding is, worst first."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        check: Name of the check.
        severity: ``"ok"``, ``"note"`` (worth knowing), ``"warning"`` or ``"error"``.
        value: Number that the finding rests on.
        threshold: Number that ``value`` is compared with; NaN where there is none.
        cause: Likely meaning.
        advice: Next step; empty where there is nothing to do.

    Example:
        >>> Finding("pareto_k", "ok", 0.2, 0.7, "q is close to the posterior.", "").severity
        'ok'
    """

    check: str
    severity: Severity
    value: float
    threshold: float
    cause: str
    advice: str


@dataclass(frozen=True, repr=False)
class Diagnosis(Summarized):
    """All findings about an inference, worst first; ``str()`` gives one line per finding.

    Attributes:
        findings: Findings, worst first.

    Example:
        >>> str(as_diagnosis([Finding("pareto_k", "ok", 0.2, 0.7, "q is close to the posterior.", "")]))
        '     OK  pareto_k = 0.2: q is close to the posterior.'
    """

    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        """Severity of the worst finding."""
        return self.findings[0].severity

    def to_frame(self) -> pd.DataFrame:
        """Make a table with one line per finding."""
        return pd.DataFrame([vars(finding) for finding in self.findings]).set_index("check")

    def __str__(self) -> str:
        lines = [f"{f.severity.upper():>7}  {f.check} = {f.value:.3g}: {f.cause} {f.advice}" for f in self.findings]
        return "\n".join(line.rstrip() for line in lines)

    def _summary(self) -> Mapping[str, object]:
        found = {s: [f.check for f in self.findings if f.severity == s] for s in get_args(Severity)}
        return {severity: ", ".join(checks) for severity, checks in found.items() if checks}


def check_weights(log_weights: Array) -> list[Finding]:
    """Check how far q is from the posterior, from log weights (S,) in nats."""
    k, threshold, share = pareto_k(log_weights)
    severity = _grade(k, warning=threshold, error=1.0)
    cause, advice = "q is close to the posterior.", ""
    if not np.isfinite(log_weights).all():
        cause = "some draws have no finite density under the model or under q."
        advice = "Look for rows that the likelihood gives no probability, and for draws far outside the prior."
    elif severity != "ok":
        cause = (
            "q misses part of the posterior: the family is too narrow or not yet trained, or the model misspecified."
        )
        advice = "Train longer, try guide='full_covariance' or laplace(), and compare with mcmc() on a small model."
    found = [Finding("pareto_k", severity, k, threshold, cause, advice)]
    few = not share > 0.1
    cause = "share of the draws that importance weighting would use."
    hint = "Numbers that weigh draws by p / q (LOO) rest on few of them: raise num_draws." if few else ""
    found.append(Finding("importance_share", "note" if few else "ok", share, 0.1, cause, hint))
    elbo = float(np.mean(log_weights))
    cause = "nats per data set, for comparing guides of one prior."
    fine = np.isfinite(elbo)
    return [*found, Finding("elbo", "ok" if fine else "error", elbo, float("nan"), cause, "" if fine else advice)]


def check_history(history: pd.DataFrame | None) -> list[Finding]:
    """Check whether the loss still falls, compared with its Monte Carlo noise."""
    if history is None or len(history) < 30:
        return []
    tail = history["loss"].to_numpy(dtype=float)[-max(len(history) // 3, 20) :]
    steps = np.arange(len(tail)) - (len(tail) - 1) / 2
    with np.errstate(invalid="ignore"):  # infinite losses: z is NaN, which counts as falling
        centered = tail - tail.mean()
        slope = float(steps @ centered / (steps @ steps))
        rounding = np.finfo(float).eps * np.abs(tail).max() + np.finfo(float).tiny  # a constant loss has no other noise
        noise = np.maximum(np.std(centered - slope * steps, ddof=2), rounding)
        z = slope / float(noise) * float(np.sqrt(steps @ steps))
    falling = not z > -3
    cause = "standard errors by which the loss still changes over the last third of the training."
    if np.isnan(z):
        cause = "the loss is not finite everywhere in the last third of the training."
    advice = "Train longer, or raise the learning rates of loc and scale." if falling else ""
    return [Finding("loss_slope", "warning" if falling else "ok", z, -3.0, cause, advice)]


def check_scales(draws: Array, prior_draws: Array, subspace: Subspace) -> list[Finding]:
    """Find latents and layers whose posterior is a point, far too wide, or the prior, from draws (S, D) of both."""
    center, width, is_discrete = _middle(prior_draws)
    for check, values, advice in (
        ("draws", draws, "Train again, with lower learning rates."),
        ("prior_draws", width, "Check the parameters of the prior."),
    ):
        if not np.isfinite(values).all():
            cause = f"{check.replace('_', ' ')} of s are not finite."
            return [Finding(check, "error", float("nan"), float("nan"), cause, advice)]
    spread = draws.std(0, ddof=1)
    ratio = np.where((spread == 0) & (width == 0), 1.0, spread / np.maximum(width, 1e-12))
    shift = np.abs(draws.mean(0) - center) / np.maximum(width, 1e-12)
    cause = "share of latents narrower than 1 % of the prior: point estimates in effect."
    advice = "Check lr_scale and kl_weight: few data rarely say that much."
    found = [_share("collapsed_latents", ratio < 1e-2, cause, advice, limit=0.5)]
    cause = "share of latents wider than ten times the prior."
    advice = "Lower lr_scale; gauge='free' lets scales drift."
    # The width of a mask of zeros and ones follows from its mean: there is nothing to explode.
    found.append(_share("exploded_latents", (ratio > 10) & ~is_discrete, cause, advice, limit=0.0))
    edges = np.cumsum([0, *subspace.ranks])
    spans = zip(subspace.names, edges[:-1], edges[1:], strict=True)
    change = np.abs(np.log(np.maximum(ratio, 1e-12)))
    idle = [name for name, a, b in spans if shift[a:b].mean() < 0.3 and change[a:b].mean() < 0.2]
    cause = "share of layers whose posterior is still the prior" + (f" (such as {idle[0]})." if idle else ".")
    advice = "The data say nothing about them: leave them out of target_modules, or train longer." if idle else ""
    return [*found, Finding("idle_layers", "note" if idle else "ok", len(idle) / len(subspace), 0.0, cause, advice)]


def check_drift(mean: Prediction | NumericPrediction, draws: Prediction | NumericPrediction) -> list[Finding]:
    """Check how far the prediction at the posterior mean is from the average over draws.

    The Monte Carlo error of the draws counts as drift. Pass draws whose average is the posterior mean.
    """
    if isinstance(mean, Prediction) and isinstance(draws, Prediction):
        drift = float(0.5 * np.abs(mean.probs - draws.probs).sum(1).mean())
    elif isinstance(mean, NumericPrediction) and isinstance(draws, NumericPrediction):
        scale = np.sqrt(np.where(np.isinf(draws.total), np.nan, draws.total))  # nothing is far on an infinite scale
        drift = float((np.abs(mean.mean - draws.mean) / scale).mean())
    else:
        return []
    far = not drift < 0.05
    cause = "distance (total variation, or standard deviations) of the prediction at the mean from that over draws."
    advice = "Report predictions over draws: num_draws=0 is another model here." if far else ""
    return [Finding("mean_vs_draws", "note" if far else "ok", drift, 0.05, cause, advice)]


def check_chains(s: Array, what: Literal["chain", "restart"]) -> list[Finding]:
    """Check the agreement of chains or restarts (C, S, D): the largest R-hat of a latent.

    For restarts it is the larger of the rank-normalized and the classical R-hat. The first detects restarts of
    different width, but has an upper bound, however far apart the restarts are. The second passes 2 where two restarts
    are more than three standard deviations apart.
    """
    threshold, error, methods = (1.01, 1.1, ["rank"]) if what == "chain" else (1.1, 2.0, ["rank", "split"])
    if len(s) < 2:
        cause, advice = f"one {what} cannot tell whether it is stuck.", f"Run two {what}s or more."
        return [Finding("r_hat", "warning", float("nan"), threshold, cause, advice)]
    with np.errstate(all="ignore"):  # latents that never move
        of_latent = [[float(array_stats.rhat(s[..., d], method=m)) for m in methods] for d in range(s.shape[-1])]
    r_hat = float(np.max(of_latent))  # NaN if any is
    severity = _grade(r_hat, warning=threshold, error=error)
    cause = f"largest ratio of the spread over all {what}s to that within one."
    advice = "" if severity == "ok" else f"The {what}s disagree: run longer, or there are several modes."
    if np.isnan(r_hat):
        latent = int(np.isnan(of_latent).any(1).argmax())
        cause = f"latent {latent} has no R-hat: within a {what} it never moves, or it is not finite."
        advice = "Take a smaller step size." if what == "chain" else "Restart a guide with a spread, not a point."
    return [Finding("r_hat", severity, r_hat, threshold, cause, advice)]


def as_diagnosis(findings: Sequence[Finding]) -> Diagnosis:
    """Sort findings by severity; a value that is NaN is an error, never ok."""
    order = get_args(Severity)
    unknown: dict[str, Any] = {
        "severity": "error",
        "cause": "could not be computed.",
        "advice": "Check the posterior and the data.",
    }
    honest = [replace(f, **unknown) if np.isnan(f.value) and f.severity == "ok" else f for f in findings]
    return Diagnosis(tuple(sorted(honest, key=lambda f: order.index(f.severity))))


def _grade(value: float, *, warning: float, error: float) -> Severity:
    """Grade a value that should be small; NaN is an error."""
    if np.isnan(value) or value >= error:
        return "error"
    return "warning" if value >= warning else "ok"


def _share(check: str, where: Array, cause: str, advice: str, *, limit: float) -> Finding:
    share = float(np.mean(where))
    bad = share > limit
    return Finding(check, "warning" if bad else "ok", share, limit, cause, advice if bad else "")


def _middle(draws: Array) -> tuple[Array, Array, Array]:
    """Compute center (D,) and width (D,) of draws (S, D), and which latents are discrete (D,).

    Center and width are the median and half of the central 68 %, which heavy tails do not change much. For discrete
    latents, whose quantiles jump, they are mean and standard deviation.
    """
    low, median, high = np.quantile(draws, [0.158655, 0.5, 0.841345], axis=0)
    is_discrete = (np.diff(np.sort(draws, axis=0), axis=0) == 0).mean(0) > 0.5  # continuous draws never repeat
    center = np.where(is_discrete, draws.mean(0), median)
    return center, np.where(is_discrete, draws.std(0, ddof=1), (high - low) / 2), is_discrete
