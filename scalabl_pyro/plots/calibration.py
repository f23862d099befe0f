"""The reliability diagram: how often answers of a confidence are right, with the number of rows behind each point."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from .. import metrics
from .._arguments import known_arguments
from .inputs import Predictions, answered, by_name, name_of, scored
from .style import METHOD, QUIET, Style, axes, next_style, visible

#: Height of the strip of counts of one method, in units of accuracy, and the part of it that bars may fill.
STRIP, BAR = 0.17, 0.09
#: Height of one legend entry, as a share of the axes. The legend stands above the diagram, where it hides nothing.
ENTRY = 0.055
#: Largest number of bins whose counts are written out.
MAX_NUMBERS = 15


@known_arguments
def reliability(
    prediction: Predictions,
    *,
    num_bins: int = 15,
    bins: metrics.Bins = "width",
    level: float = 0.95,
    ax: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
) -> Axes:
    """Plot accuracy against confidence in bins, with an interval per bin and a strip of the numbers of rows.

    Confidence is the largest probability of a row. A point on the dashed diagonal is calibrated; below it, the model is
    too sure. The vertical bars are Wilson score intervals of the accuracy (Wilson, 1927). A bin whose interval contains
    the diagonal gives no evidence against calibration. The strip below the diagram shows how many rows each bin holds,
    one strip per method.

    Args:
        prediction: Prediction of rows with answers, or predictions of several methods by name.
        num_bins: Number of bins. The numbers of rows are written out up to 15 bins of equal width.
        bins: ``"width"`` for bins of equal width, or ``"mass"`` for bins of equal numbers of rows.
        level: Confidence level of the intervals, between 0 and 1.
        ax: Axes to draw on; None for new ones.
        label: Legend entry of a single prediction. The expected calibration error (ECE) over the same bins is added.
        color: Color of a single prediction; None for the next one.

    Returns:
        The axes.

    Raises:
        TypeError: If something else than a prediction of classes is given.
        ValueError: If no row has an answer, or if an option is out of range.

    Example:
        >>> scalabl_pyro.plots.reliability(prediction)
    """
    found = {}
    for name, given in by_name(prediction, label=label, color=color).items():
        data = scored(answered(given, name=name_of(name)))
        table = metrics.reliability(*data, num_bins=num_bins, bins=bins, level=level)
        error = (metrics.ece if bins == "width" else metrics.adaptive_ece)(*data, num_bins=num_bins)
        found[name] = table, f"ECE {100 * error:.1f} %"
    ax = axes(ax, height=4.6)
    for name, (table, error_text) in found.items():
        style = next_style(ax, color)
        if style.place == 0:
            ax.plot([0, 1], [0, 1], color=QUIET, linewidth=1.2, linestyle="--", zorder=0)
        _points(ax, table, style, error_text if name is None else f"{name}: {error_text}")
        _strip(ax, table, style, num_bins=num_bins, equal_width=bins == "width", is_marked=name is not None)
    ax.set(xlim=(0, 1.02), xlabel="confidence (largest probability)", ylabel="accuracy (share of right answers)")
    ax.set_title(f"Reliability, with {100 * level:g} % intervals")
    ax.legend(frameon=False, loc="upper left", fontsize="small")
    return ax


def _points(ax: Axes, table: pd.DataFrame, style: Style, label: str) -> None:
    below, above = table["accuracy"] - table["low"], table["high"] - table["accuracy"]
    drawn = ax.errorbar(
        table["confidence"],
        table["accuracy"],
        yerr=[below, above],
        color=style.color,
        marker=style.marker,
        markersize=4.5,
        linestyle=style.line,
        linewidth=1.0,
        elinewidth=0.8,
        capsize=2,
        label=label,
    )
    drawn.lines[0].set_gid(METHOD)


def _strip(ax: Axes, table: pd.DataFrame, style: Style, *, num_bins: int, equal_width: bool, is_marked: bool) -> None:
    """Draw bars of the numbers of rows below the diagram, in a strip per method, with the marker of a named method."""
    bottom, count = -STRIP * (style.place + 1), table["count"]
    x, width = ((table.index + 0.5) / num_bins, 0.9 / num_bins) if equal_width else (table["confidence"], 0.008)
    heights = BAR * count / count.max()
    ax.bar(x, heights, width=width, bottom=bottom, color=style.color, alpha=0.6, linewidth=0)
    if is_marked:
        ax.plot([0.015], [bottom + BAR / 2], linestyle="", marker=style.marker, markersize=4.5, color=style.color)
    note: dict[str, Any] = {"fontsize": 6, "va": "bottom", "color": visible("#444444", ax)}
    if not equal_width:
        low, high = count.min(), count.max()
        text = f"{low} rows per bin" if low == high else f"{low} to {high} rows per bin"
        ax.text(0.04, bottom, text, **note)
    elif num_bins <= MAX_NUMBERS:
        for place, height, number in zip(x, heights, count, strict=True):
            ax.text(place, bottom + height, _short(number), ha="center", **note)
    ax.axhline(0, color=QUIET, linewidth=0.8, zorder=0)
    legend = min(0.02 + ENTRY * (style.place + 1), 0.6)
    ax.set_ylim(bottom - 0.03, 1 + (1.03 - bottom) * legend / (1 - legend))
    strips = [-STRIP * (i + 1) + BAR / 2 for i in range(style.place + 1)]
    ax.set_yticks([*strips, 0, 0.2, 0.4, 0.6, 0.8, 1], [*["rows"] * len(strips), *"0 0.2 0.4 0.6 0.8 1".split()])


def _short(number: int) -> str:
    return str(number) if number < 1000 else f"{number / 1000:.1f}k" if number < 10_000 else f"{number / 1000:.0f}k"
