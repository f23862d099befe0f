"""The course of a training."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from .._arguments import known_arguments
from .._errors import check_count, describe
from .style import MARK, QUIET, WARM, axes, visible


@known_arguments
def history(frame: pd.DataFrame, *, ax: Axes | None = None, smooth: int = 10) -> Axes:
    """Plot the negative ELBO and its two parts against the step, in nats per example.

    Args:
        frame: History of a fit, as in ``FitResult.history``.
        ax: Axes to draw on; None for new ones.
        smooth: Number of steps in the running mean that is drawn over the raw values.

    Returns:
        The axes.

    Example:
        >>> scalabl_pyro.plots.history(result.history)
    """
    _check(frame, smooth)
    ax = axes(ax)
    parts = {
        "loss = NLL + KL": (frame["loss"], MARK, "-"),
        "NLL": (frame["nll"], WARM, "--"),
        "KL": (frame["loss"] - frame["nll"], QUIET, "-."),
    }
    for name, (values, shade, line) in parts.items():
        color, mean = visible(shade, ax), values.rolling(smooth, min_periods=1).mean()
        ax.plot(frame["step"], values, color=color, alpha=0.25, linewidth=0.8)
        ax.plot(frame["step"], mean, color=color, linewidth=1.5, linestyle=line, label=name)
    ax.set(xlabel="step", ylabel="nats per example", title="Training: loss (negative ELBO) and its parts")
    ax.set_ylim(bottom=min(0, *(float(values.min()) for values, _, _ in parts.values())))
    ax.legend(frameon=False)
    return ax


@known_arguments
def loss(frame: pd.DataFrame, *, ax: Axes | None = None, smooth: int = 10) -> Axes:
    """Plot the NLL of the training batches and of held-out rows against the step, in nats per row.

    A dotted line marks the step whose state the posterior holds. If the held-out NLL rises while the training NLL
    falls, the training overfits. The two differ in more than the rows: a training row has one draw of its own, while a
    held-out row is scored under the average over draws, whose NLL is lower.

    Args:
        frame: History of a fit, as in ``FitResult.history``. Without held-out rows, the plot shows the training NLL
            alone.
        ax: Axes to draw on; None for new ones.
        smooth: Number of steps in the running mean of the training NLL.

    Returns:
        The axes.

    Example:
        >>> result = scalabl_pyro.fit(blora, task, rows, eval_data=test_data, num_steps=100)
        >>> scalabl_pyro.plots.loss(result.history)
    """
    _check(frame, smooth)
    ax = axes(ax)
    color, mean = visible(WARM, ax), frame["nll"].rolling(smooth, min_periods=1).mean()
    ax.plot(frame["step"], frame["nll"], color=color, alpha=0.25, linewidth=0.8)
    ax.plot(frame["step"], mean, color=color, linewidth=1.5, linestyle="--", label="training batches")
    if "eval_nll" in frame:
        scored = frame[frame["eval_nll"].notna()]
        line: dict[str, Any] = {"color": visible(MARK, ax), "marker": "o", "markersize": 4, "linewidth": 1.5}
        ax.plot(scored["step"], scored["eval_nll"], label="held-out rows", **line)
    if "kept" in frame:
        for number, step in enumerate(frame.loc[frame["kept"], "step"]):
            label = "posterior" if number == 0 else None
            ax.axvline(step, color=visible(QUIET, ax), linewidth=1.2, linestyle=":", label=label)
    ax.set(xlabel="step", ylabel="NLL, nats per row", title="NLL of training and held-out rows")
    ax.legend(frameon=False)
    return ax


def _check(frame: object, smooth: int) -> None:
    check_count(smooth=smooth)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"frame is {describe(frame)}, expected the history of a fit, result.history.")
