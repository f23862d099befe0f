"""Checks of a training by its history: whether the loss still falls, the guide still moves, or harm was done."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from ..metrics import Array
from .finding import Finding

#: Shorter histories say nothing.
MIN_STEPS = 30
#: Standard errors that count as noise.
NOISE = 3.0
#: A fall over the last third of the training that is a smaller share of the whole fall is none.
SMALLEST_FALL = 0.02
#: A change of the KL over the last third that is a smaller share of its whole change is none.
SMALLEST_CHANGE = 0.05


def check_history(history: pd.DataFrame | None) -> list[Finding]:
    """Check whether the loss still falls and whether it ended above its start, compared with its Monte Carlo noise."""
    if history is None or len(history) < MIN_STEPS:
        return []
    loss = history["loss"].to_numpy(dtype=float)
    rates = history["lr"].to_numpy(dtype=float) if "lr" in history else np.ones(len(loss))
    return [_slope(loss, rates), _end(loss, rates if "lr" in history else None)]


def check_guide(history: pd.DataFrame | None) -> list[Finding]:
    """Check whether the KL still changes, and with it the means and scales of the guide.

    Scales that have not arrived show here even if the loss is flat, because the KL is a small part of it.
    """
    if history is None or len(history) < MIN_STEPS or not np.isfinite(history["kl"]).all():
        return []  # a point has no KL
    kl = history["kl"].to_numpy(dtype=float)
    trend = _trend(kl, history["lr"].to_numpy(dtype=float) if "lr" in history else np.ones(len(kl)))
    share = abs(trend.change) / max(float(np.ptp(kl)), float(np.finfo(float).tiny))
    if abs(trend.z) < NOISE or share < SMALLEST_CHANGE:
        cause = "the KL has stopped changing, and with it the means and scales of the guide."
        return [Finding("kl_slope", "ok", share, SMALLEST_CHANGE, cause, "")]
    cause = "the KL still changes, and with it the means and scales of the guide."
    advice = "Train longer: raise num_steps, or the rate of the scales, lr_scale."
    return [Finding("kl_slope", "warning", share, SMALLEST_CHANGE, cause, advice)]


class _Trend(NamedTuple):
    """Linear trend over the last third of a training: in standard errors, over its whole length, and the level."""

    z: float
    change: float
    level: float


def _trend(values: Array, rates: Array) -> _Trend:
    """Fit a line to the last third of the distance that the learning rates allowed.

    The distance is the sum of the learning rates. Under a decay to 0 the last steps hardly move, so that the loss of
    any training is flat there, however short it is. Over the distance it is not.
    """
    distance = np.cumsum(rates)
    if not np.isfinite(distance).all() or distance[-1] <= 0:
        distance = np.arange(1.0, len(values) + 1)
    where = distance > distance[-1] * (2 / 3) * (1 + 1e-12)
    where[-20:] = True
    tail, x = values[where], distance[where] - distance[where].mean()
    with np.errstate(invalid="ignore"):  # infinite losses: z is NaN, which counts as falling
        slope = float(x @ (tail - tail.mean()) / (x @ x))
        rounding = np.finfo(float).eps * np.abs(tail).max() + np.finfo(float).tiny  # a constant loss has no other noise
        noise = np.maximum(np.std(tail - tail.mean() - slope * x, ddof=2), rounding)
        z = slope / float(noise) * float(np.sqrt(x @ x))
        return _Trend(z, slope * float(np.ptp(x)), float(tail.mean()))


def _slope(loss: Array, rates: Array) -> Finding:
    """Find out whether the loss still falls over the last third of the distance that the learning rates allowed."""
    z, change, level = _trend(loss, rates)
    with np.errstate(invalid="ignore"):
        small = -change < SMALLEST_FALL * (loss[: max(len(loss) // 20, 5)].mean() - level)
    if np.isnan(z):
        cause = "the loss is not finite everywhere in the last third of the training."
        return Finding("loss_slope", "warning", z, -NOISE, cause, "Lower the learning rates, and train again.")
    if z > -NOISE or small:
        cause = "the loss has stopped falling, compared with its noise."
        return Finding("loss_slope", "ok", z, -NOISE, cause, "")
    cause = "the training was too short: the loss still falls, by more than its noise."
    return Finding("loss_slope", "warning", z, -NOISE, cause, "Train longer: raise num_steps.")


def _end(loss: Array, rates: Array | None) -> Finding:
    """Find out whether the mean loss of the last tenth of the steps is above that of the first steps."""
    first, last = loss[: max(len(loss) // 50, 5)], loss[-max(len(loss) // 10, 10) :]
    with np.errstate(invalid="ignore", over="ignore"):
        rise = float(last.mean() - first.mean())
        error = float(np.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last)))
    if rise <= NOISE * error + np.finfo(float).eps * np.abs(loss).max():
        return Finding("loss_end", "ok", rise, 0.0, "the loss, in nats per row, did not end above its start.", "")
    cause = "the loss, in nats per row, ended above its start: the training did harm."
    if not np.isfinite(rise):
        cause = "the loss was not finite at its start or at its end."
    used = "" if rates is None else f" (lr went up to {np.nanmax(rates):.3g})"
    advice = f"Lower the learning rates{used}, or set max_grad_norm, and train again."
    return Finding("loss_end", "error", rise, 0.0, cause, advice)
