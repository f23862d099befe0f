"""Checks of q against the posterior, from densities of draws of q: tails, width, location, and the ELBO."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..metrics import Array
from .finding import Finding, as_diagnosis, grade
from .psis import ROUNDING, pareto_k

#: q counts as too wide or too narrow from this factor on, and as far too wide or narrow from the second one on.
WIDTH_LIMITS = (1.4, 3.0)
#: A latent counts as shifted from this number of posterior standard deviations on, and as far off from the second on.
SHIFT_LIMITS = (0.5, 2.0)
#: Standard errors of Monte Carlo noise that do not count: of one number, and of the largest of up to 1000.
NOISE, NOISE_OF_MANY = 3.0, 4.0
#: Share of the draws that carry the weights: below the first q differs from the posterior, below the second by much.
SHARES = (0.5, 0.1)


def against_posterior(log_joint: Array, log_q: Array, draws: Array, labels: Sequence[str]) -> list[Finding]:
    """Check the tails, the width and the location of q.

    A wrong width or location also gives bad weights: they then state it as their cause. The weights alone cannot tell,
    because a q that is too wide in many latents has a large k-hat, too.

    Args:
        log_joint: (S,) log p(y, s) of draws of q, nats.
        log_q: (S,) log q(s) of the same draws.
        draws: (S, D) draws.
        labels: Names of the D latents.
    """
    reasons = [*check_width(log_joint, log_q), *check_shift(log_joint, log_q, draws, labels)]
    found = check_weights(log_joint - log_q)
    known = as_diagnosis(reasons).findings[:1]
    if known and known[0].severity in ("warning", "error") and np.isfinite(found[0].value):
        found = [f if f.severity == "ok" else replace(f, cause=known[0].cause) for f in found]
    return [*found, *reasons]


def check_weights(log_weights: Array) -> list[Finding]:
    """Check how far q is from the posterior, from log weights (S,) in nats.

    k-hat is the tail index of the weights p / q. It is large where q misses a part of the posterior: where q is too
    narrow, elsewhere, or without its correlations. The weights of a q that is too wide are bounded, so k-hat is small
    there for a few latents. It is large for many latents, because none of the draws comes near the bound. The share of
    draws that carry the weights is small in all of these cases, and :func:`check_width` tells them apart.
    """
    k, threshold, share = pareto_k(log_weights)
    severity = grade(k, warning=threshold, error=1.0)
    cause, advice = "the guide is close to the exact posterior: the weights p / q of its draws have no heavy tail.", ""
    if not np.isfinite(log_weights).all():
        cause = "some draws have no finite density under the model or under the guide."
        advice = "Look for rows that the likelihood gives no probability, and for draws far outside the prior."
    elif severity != "ok":
        cause = (
            "the guide is not close to the exact posterior: in some direction it is too narrow, too wide or elsewhere, "
            "or it lacks a correlation. Small errors of many latents add up."
        )
        advice = "Train longer, try guide='full_covariance' or laplace(), and compare with mcmc() on a small model."
    elif not share >= SHARES[0]:
        cause = "the weights p / q have no heavy tail. A guide that is too wide has none either: see width and share."
    found = [Finding("pareto_k", severity, k, threshold, cause, advice)]
    found.append(_share_finding(share))
    elbo = float(np.mean(log_weights))
    if np.isfinite(elbo):
        cause = "the ELBO, in nats per data set, compares guides of one prior."
        return [*found, Finding("elbo", "ok", elbo, float("nan"), cause, "")]
    return [*found, Finding("elbo", "error", elbo, float("nan"), "the ELBO is not finite.", advice)]


def _share_finding(share: float) -> Finding:
    different, far = SHARES
    if share >= different:
        cause = "most draws carry weight if draws are weighted by p / q."
        return Finding("importance_share", "ok", share, different, cause, "")
    cause = (
        "the guide differs from the exact posterior: if its draws are weighted by p / q, few of them carry the weight."
    )
    advice = "Numbers that weigh draws by p / q (LOO) rest on few of them: raise num_draws."
    return Finding("importance_share", "note" if share >= far else "warning", share, different, cause, advice)


def check_width(log_joint: Array, log_q: Array) -> list[Finding]:
    """Check whether q is as wide as the posterior, from both log densities (S,) of draws of q.

    The slope of log p(y, s) over log q(s) is 1 if q is the posterior. If both are normal, it is the mean over latents
    of (scale of q)^2 times the posterior's precision: 4 if q is twice as wide. By Stein's identity it is then also 1
    minus the derivative of the ELBO by the logarithm of a common factor of all scales, per latent: at the optimum of
    the ELBO it is 1, whatever the family. Its square root is the value of the finding.
    """
    fit = _regress(log_joint, log_q)
    if fit is None:
        return []
    slope, error, _ = fit
    limit, far = WIDTH_LIMITS
    ratio = float(np.sqrt(max(slope, 0.0)))
    low, high = (float(np.sqrt(max(slope + sign * NOISE * error, 0.0))) for sign in (-1, 1))
    is_wide, is_narrow = ratio > limit and low > 1, ratio < 1 / limit and high < 1
    if is_wide or is_narrow:
        extreme = ratio > far or ratio < 1 / far
        what = "wide: its uncertainties are too large" if is_wide else "narrow: it is overconfident"
        cause = (
            f"on average over the latents the guide is {ratio:.2g} times as wide as the exact posterior, too {what}."
        )
        advice = (
            "The scales have not arrived: train longer, or raise lr_scale. laplace() sets them in one pass. A "
            "kl_weight other than 1 moves them on purpose."
        )
        return [
            Finding("width", "error" if extreme else "warning", ratio, limit if is_wide else 1 / limit, cause, advice)
        ]
    if low < 1 / limit and high > limit:
        cause = f"these draws cannot tell how wide the guide is: {low:.2g} to {high:.2g} times the exact posterior."
        return [Finding("width", "note", ratio, limit, cause, "Raise num_draws.")]
    cause = "on average over the latents the guide is about as wide as the exact posterior."
    return [Finding("width", "ok", ratio, limit, cause, "")]


def check_shift(log_joint: Array, log_q: Array, draws: Array, labels: Sequence[str]) -> list[Finding]:
    """Check whether q lies where the posterior lies, from log densities (S,) of draws (S, D) of q.

    What the width does not explain of log p / q must not grow along any latent. Along a latent z, in standard
    deviations of q, its covariance with z is the derivative of the ELBO by the location. Divided by the square root of
    the slope of :func:`check_width` it is the distance of q from the posterior, in standard deviations of the
    posterior, if both are normal. The noise of the largest of D such numbers is added to the limits.
    """
    fit = _regress(log_joint, log_q)
    spread = draws.std(0)
    moves = spread > 0
    if fit is None or not moves.any():
        return []
    slope, _, residual = fit
    z = (draws[:, moves] - draws[:, moves].mean(0)) / spread[moves]
    ratio = np.sqrt(max(slope, 0.01))
    terms = residual[:, None] * z / ratio
    shift, noise = np.abs(terms.mean(0)), NOISE_OF_MANY * terms.std(0) / np.sqrt(len(terms))
    worst = int(np.argmax(shift - noise))
    limit, far = (float(bound + noise[worst]) for bound in SHIFT_LIMITS)
    value = float(shift[worst])
    severity = grade(value, warning=limit, error=far)
    cause = "no latent of the guide is clearly off from where the data and the prior put it."
    if severity == "ok":
        return [Finding("shift", severity, value, limit, cause, "")]
    label = np.asarray(labels)[moves][worst]
    cause = f"the guide lies elsewhere than the exact posterior: {label} is off by {value:.2g} standard deviations."
    return [Finding("shift", severity, value, limit, cause, "The locations have not arrived: train longer.")]


def _regress(log_joint: Array, log_q: Array) -> tuple[float, float, Array] | None:
    """Regress log p on log q, each (S,).

    Returns:
        Slope, its standard error and the part of log p / q that it does not explain (S,); None where a density is not
        finite, or where all draws have the same density under q, up to rounding.
    """
    p, q = np.asarray(log_joint, dtype=np.float64), np.asarray(log_q, dtype=np.float64)
    if not (np.isfinite(p).all() and np.isfinite(q).all()) or np.ptp(q) <= ROUNDING * max(1.0, np.abs(q).max()):
        return None
    x, y = q - q.mean(), p - p.mean()
    slope = float(x @ y / (x @ x))
    residual = y - slope * x
    return slope, float(np.sqrt(((x * residual) ** 2).sum()) / (x @ x)), residual
