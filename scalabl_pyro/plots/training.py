"""The course of a training."""

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
    check_count(smooth=smooth)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"frame is {describe(frame)}, expected the history of a fit, result.history.")
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
