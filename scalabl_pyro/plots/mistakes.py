"""Confident mistakes: answers with a high probability, and those of them that are wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import t as student_t

from .. import metrics
from .._arguments import known_arguments
from .._errors import describe
from ..prediction.result import Prediction
from .inputs import answered, by_name, name_of, scored
from .style import MARK, WARM, axes, visible

#: Width of a bar. The two bars of a method stand side by side, and methods have a distance of 1.
WIDTH = 0.38


@known_arguments
def confident_mistakes(
    predictions: Mapping[str, Prediction | Sequence[Prediction]],
    *,
    threshold: float = 0.9,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Plot how many rows each method answers with a probability above a threshold, and how many of these are wrong.

    The numbers stand on the bars. On the bar of wrong answers stands also their share of the confident answers. If a
    method has several predictions, such as one per seed, bars are means, dots are single predictions, and whiskers are
    intervals of the mean from Student's t distribution.

    Args:
        predictions: Mapping from the name of each method to one prediction, or to a list of them. The rows have
            answers.
        threshold: Probability that an answer must exceed to count as confident.
        level: Confidence level of the intervals, between 0 and 1.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If ``predictions`` is not a mapping, or if it holds something else than predictions of classes.
        ValueError: If no row has an answer, if the numbers of rows differ, or if an option is out of range.

    Example:
        >>> scalabl_pyro.plots.confident_mistakes({"ScalaBL": prediction}, threshold=0.8)
    """
    counts = {name: _counts(name, given, threshold) for name, given in _methods(predictions).items()}
    metrics.check_level(level)
    rows = sorted({count.rows for found in counts.values() for count in found})
    if len(rows) > 1:
        raise ValueError(
            f"The predictions have {rows[0]} to {rows[-1]} rows with answers, so that their counts cannot be compared. "
            "Predict the same rows with each method."
        )
    ax = axes(ax, width=1.8 + 1.5 * max(len(counts), 2))
    confident = [np.array([count.confident for count in found]) for found in counts.values()]
    wrong = [np.array([count.mistakes for count in found]) for found in counts.values()]
    shares = [_share(mistakes, of) for mistakes, of in zip(wrong, confident, strict=True)]
    sure = f"answered with a probability above {threshold:g}"
    _bars(ax, -WIDTH / 2, confident, [""] * len(counts), level, label=sure, color=MARK, is_pale=True)
    _bars(ax, WIDTH / 2, wrong, shares, level, label="of these, wrong (number and share)", color=WARM, is_pale=False)
    ax.set_xticks(range(len(counts)), list(counts))
    ax.set(ylabel=f"number of rows, out of {rows[0]}", xlim=(-0.6, len(counts) - 0.4))
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    ax.set_xlabel("method" if max(map(len, confident)) == 1 else "method (mean over predictions; dots: each of them)")
    ax.set_title("Confident answers, and wrong ones among them")
    ax.legend(frameon=False, loc="upper left", fontsize="small")
    return ax


def _methods(predictions: Any) -> dict[str, Any]:
    if not isinstance(predictions, Mapping):
        raise TypeError(
            f"predictions is {describe(predictions)}, expected predictions by the name of their method. Pass "
            "{'ScalaBL': prediction}."
        )
    return {str(name): given for name, given in by_name(predictions, label=None, color=None).items()}


def _counts(name: str, given: Any, threshold: float) -> list[metrics.ConfidentMistakes]:
    """Count the confident answers and mistakes of each prediction of a method."""
    if not isinstance(given, list | tuple):
        named = {name_of(name): given}
    elif given:
        named = {f"prediction {i} in the list of {name!r}": one for i, one in enumerate(given)}
    else:
        raise ValueError(f"The list of predictions of {name!r} is empty. Pass one prediction or more.")
    found = [scored(answered(one, name=text)) for text, one in named.items()]
    return [metrics.confident_mistakes(*data, threshold=threshold) for data in found]


def _share(mistakes: metrics.Array, confident: metrics.Array) -> str:
    """Say how many percent of the confident answers are wrong; nothing where none is confident."""
    return f"\n{100 * mistakes.sum() / confident.sum():.1f} %" if confident.sum() else ""


def _bars(
    ax: Axes,
    shift: float,
    counts: list[metrics.Array],
    shares: list[str],
    level: float,
    *,
    label: str,
    color: str,
    is_pale: bool,
) -> None:
    """Draw one bar per method, with its number, and with dots and an interval where it has several predictions."""
    x, ink = np.arange(len(counts)) + shift, visible(color, ax)
    means = [float(found.mean()) for found in counts]
    face: dict[str, Any] = {"facecolor": "none", "hatch": "///"} if is_pale else {"facecolor": ink}
    ax.bar(x, means, WIDTH, label=label, edgecolor=ink, linewidth=1.0, **face)
    for place, found, mean, share in zip(x, counts, means, shares, strict=True):
        top = mean
        if len(found) > 1:
            half = student_t.ppf((1 + level) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
            top = max(mean + half, found.max())
            dark = ax.title.get_color()
            ax.errorbar(place, mean, yerr=[[min(half, mean)], [half]], color=dark, capsize=3, linewidth=1.0)
            dots = np.linspace(-0.25, 0.25, len(found)) * WIDTH
            ax.plot(place + dots, found, linestyle="", marker="o", markersize=3.5, color=dark, markerfacecolor="white")
        number = f"{mean:.0f}" if len(found) == 1 else f"{mean:.1f}"
        ax.annotate(f"{number}{share}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)
