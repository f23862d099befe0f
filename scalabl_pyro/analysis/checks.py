"""Checks of the draws of a posterior: scales, drift from the mean, chains. All checks can be imported from here."""

from typing import Literal

import numpy as np

from ..lora.subspace import Subspace
from ..metrics import Array
from ..prediction.result import NumericPrediction, Prediction
from .finding import Diagnosis, Finding, Severity, as_diagnosis, grade, share
from .psis import LOO, LogWeights, good_k, pareto_k, psis_loo
from .training_checks import check_history
from .usefulness import check_usefulness
from .weight_checks import against_posterior, check_shift, check_weights, check_width

__all__ = [
    "LOO",
    "Diagnosis",
    "Finding",
    "LogWeights",
    "Severity",
    "against_posterior",
    "as_diagnosis",
    "check_chains",
    "check_drift",
    "check_history",
    "check_scales",
    "check_shift",
    "check_usefulness",
    "check_weights",
    "check_width",
    "good_k",
    "pareto_k",
    "psis_loo",
]


def check_scales(draws: Array, prior_draws: Array, subspace: Subspace) -> list[Finding]:
    """Find latents and layers whose posterior is a point, far too wide, or the prior, from draws (S, D) of both."""
    center, width, is_discrete = _middle(prior_draws)
    for check, values, advice in (
        ("draws", draws, "Train again, with lower learning rates."),
        ("prior_draws", width, "Check the parameters of the prior."),
    ):
        if not np.isfinite(values).all():
            cause = f"the {check.replace('_', ' ')} of s are not finite."
            return [Finding(check, "error", float("nan"), float("nan"), cause, advice)]
    spread = draws.std(0, ddof=1)
    ratio = np.where((spread == 0) & (width == 0), 1.0, spread / np.maximum(width, 1e-12))
    shift = np.abs(draws.mean(0) - center) / np.maximum(width, 1e-12)
    good, bad = "few latents are point estimates in effect.", "most latents are narrower than 1 % of their prior."
    advice = "Check lr_scale and kl_weight: few data rarely say that much."
    found = [share("collapsed_latents", ratio < 1e-2, good, bad, advice, limit=0.5)]
    good, bad = "no latent is wider than ten times its prior.", "some latents are wider than ten times their prior."
    advice = "Lower lr_scale; gauge='free' lets scales drift."
    # The width of a mask of zeros and ones follows from its mean: there is nothing to explode.
    found.append(share("exploded_latents", (ratio > 10) & ~is_discrete, good, bad, advice, limit=0.0))
    edges = np.cumsum([0, *subspace.ranks])
    spans = zip(subspace.names, edges[:-1], edges[1:], strict=True)
    change = np.abs(np.log(np.maximum(ratio, 1e-12)))
    idle = [name for name, a, b in spans if shift[a:b].mean() < 0.3 and change[a:b].mean() < 0.2]
    cause = f"some layers still have their prior as posterior, such as {idle[0]}." if idle else "no layer is idle."
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
    unit = "total variation" if isinstance(mean, Prediction) else "standard deviations"
    cause = f"the prediction at the posterior mean is {'far from' if far else 'near'} that over draws, in {unit}."
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
    from arviz_stats.base import array_stats

    with np.errstate(all="ignore"):  # latents that never move
        of_latent = [[float(array_stats.rhat(s[..., d], method=m)) for m in methods] for d in range(s.shape[-1])]
    r_hat = float(np.max(of_latent))  # NaN if any is
    severity = grade(r_hat, warning=threshold, error=error)
    cause = f"the {what}s {'agree' if severity == 'ok' else 'disagree'} on the latent on which they agree least."
    advice = "" if severity == "ok" else f"The {what}s disagree: run longer, or there are several modes."
    if np.isnan(r_hat):
        latent = int(np.isnan(of_latent).any(1).argmax())
        cause = f"latent {latent} has no R-hat: within a {what} it never moves, or it is not finite."
        advice = "Take a smaller step size." if what == "chain" else "Restart a guide with a spread, not a point."
    return [Finding("r_hat", severity, r_hat, threshold, cause, advice)]


def _middle(draws: Array) -> tuple[Array, Array, Array]:
    """Compute center (D,) and width (D,) of draws (S, D), and which latents are discrete (D,).

    Center and width are the median and half of the central 68 %, which heavy tails do not change much. For discrete
    latents, whose quantiles jump, they are mean and standard deviation.
    """
    low, median, high = np.quantile(draws, [0.158655, 0.5, 0.841345], axis=0)
    is_discrete = (np.diff(np.sort(draws, axis=0), axis=0) == 0).mean(0) > 0.5  # continuous draws never repeat
    center = np.where(is_discrete, draws.mean(0), median)
    return center, np.where(is_discrete, draws.std(0, ddof=1), (high - low) / 2), is_discrete
