"""Checks of a training by its history: whether the loss still falls, and whether it ended above its start."""

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


def check_history(history: pd.DataFrame | None) -> list[Finding]:
    """Check whether the loss still falls and whether it ended above its start, compared with its Monte Carlo noise."""
    if history is None or len(history) < MIN_STEPS:
        return []
    loss = history["loss"].to_numpy(dtype=float)
    rates = history["lr"].to_numpy(dtype=float) if "lr" in history else np.ones(len(loss))
    return [_slope(loss, rates), _end(loss, rates if "lr" in history else None)]


def _slope(loss: Array, rates: Array) -> Finding:
    """Find out whether the loss still falls over the last third of the distance that the learning rates allowed.

    The distance is the sum of the learning rates. Under a decay to 0 the last steps hardly move, so that the loss of
    any training is flat there, however short it is. Over the distance it is not.
    """
    distance = np.cumsum(rates)
    if not np.isfinite(distance).all() or distance[-1] <= 0:
        distance = np.arange(1.0, len(loss) + 1)
    where = distance > distance[-1] * (2 / 3) * (1 + 1e-12)
    where[-20:] = True
    tail, x = loss[where], distance[where] - distance[where].mean()
    with np.errstate(invalid="ignore"):  # infinite losses: z is NaN, which counts as falling
        slope = float(x @ (tail - tail.mean()) / (x @ x))
        rounding = np.finfo(float).eps * np.abs(tail).max() + np.finfo(float).tiny  # a constant loss has no other noise
        noise = np.maximum(np.std(tail - tail.mean() - slope * x, ddof=2), rounding)
        z = slope / float(noise) * float(np.sqrt(x @ x))
        small = -slope * np.ptp(x) < SMALLEST_FALL * (loss[: max(len(loss) // 20, 5)].mean() - tail.mean())
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
