"""Selective prediction: the error that is left when the least certain rows go to a person."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .. import metrics
from .._arguments import known_arguments
from .._errors import check_choice, check_flag
from .inputs import Predictions, Scored, answered, by_name, name_of, scored
from .style import METHOD, QUIET, Style, axes, next_style

Doubt = Literal["max_probability", "total", "aleatoric", "epistemic"]
"""Words for scores that order rows: 1 - maximum probability, or a kind of uncertainty."""

#: Height of one legend entry, as a share of the axes.
ENTRY = 0.07
RANDOM, IDEAL = "rows in random order", "ideal order: right answers first"


@known_arguments
def risk_coverage(
    prediction: Predictions,
    *,
    uncertainty: Doubt | metrics.Array | None = "max_probability",
    bounds: bool = True,
    ax: Axes | None = None,
    label: str | None = None,
    color: str | None = None,
) -> Axes:
    """Plot the error of the answered rows against the share of rows that are answered, most certain rows first.

    Two thin lines per method show a random order and the ideal order. In random order, the error is the overall error
    at every coverage. In the ideal order, all right answers come before all wrong ones. All three lines end at the same
    point, which is the error if every row is answered.

    Args:
        prediction: Prediction of rows with answers, or predictions of several methods by name.
        uncertainty: Score that orders the rows: ``"max_probability"`` for 1 - maximum probability, ``"total"``,
            ``"aleatoric"`` or ``"epistemic"``; or for one prediction an array (N,), higher = less certain. None means
            ``"max_probability"``.
        bounds: Whether to draw the two thin lines. Leave them out where many methods share one axes.
        ax: Axes to draw on; None for new ones.
        label: Legend entry of a single prediction. The area under the curve (AURC; Geifman and El-Yaniv, 2017) is
            added.
        color: Color of a single prediction; None for the next one.

    Returns:
        The axes.

    Raises:
        TypeError: If something else than a prediction of classes is given, or if ``bounds`` is not True or False.
        ValueError: If no row has an answer, if the score is unknown or has another shape, or if the epistemic
            uncertainty of less than two draws is asked for: it is 0 for every row.

    Example:
        >>> scalabl_pyro.plots.risk_coverage(prediction, uncertainty="epistemic")
    """
    check_flag(bounds=bounds)
    found = {}
    for name, given in by_name(prediction, label=label, color=color).items():
        known = answered(given, name=name_of(name))
        found[name] = scored(known), _score(given, known, uncertainty, is_single=not isinstance(prediction, Mapping))
    curves = {name: metrics.risk_coverage(*data, uncertainty=score) for name, (data, score) in found.items()}
    ax = axes(ax)
    score_name = uncertainty if isinstance(uncertainty, str) and uncertainty != "max_probability" else None
    for name, (data, _) in found.items():
        coverage, risk = curves[name]
        parts = [part for part in (name, score_name) if part is not None]
        area = f"AURC {risk.mean():.3f}"
        style = next_style(ax, color)
        marks: dict[str, Any] = {"marker": style.marker, "markersize": 4, "markevery": (0.07, 0.2)}
        text = f"{', '.join(parts)}: {area}" if parts else area
        ax.plot(coverage, risk, color=style.color, linestyle=style.line, label=text, gid=METHOD, **marks)
        if bounds:
            _bounds(ax, *data, style)
    ax.set(xlabel="coverage (share of rows answered)", ylabel="error among answered rows", xlim=(0, 1))
    ax.set_title("Selective prediction")
    _legend(ax, bounds=bounds)
    return ax


def _score(given: Scored, known: Scored, uncertainty: Any, *, is_single: bool) -> metrics.Array | None:
    """Return the score of the rows with answers; None for 1 - maximum probability."""
    if uncertainty is None or (isinstance(uncertainty, str) and uncertainty == "max_probability"):
        return None
    if isinstance(uncertainty, str):
        check_choice("uncertainty", uncertainty, get_args(Doubt))
        if uncertainty == "epistemic" and known.num_draws < 2:
            raise ValueError(
                "uncertainty='epistemic' compares draws, and this prediction has one only, so that it is 0 for every "
                "row. Predict with num_draws=2 or more, or use uncertainty='total'."
            )
        return getattr(known, uncertainty)
    if not is_single:
        raise ValueError(
            "uncertainty is an array, which belongs to one prediction, but predictions are given by name. Pass a word "
            f"({', '.join(map(repr, get_args(Doubt)))}), or call the plot once per method with ax=."
        )
    score = np.asarray(uncertainty)
    return score[given.is_answered] if score.shape == given.is_answered.shape else score


def _bounds(ax: Axes, probs: metrics.Array, labels: metrics.Labels, style: Style) -> None:
    """Draw the curves of a random order and of the ideal order."""
    wrong = probs.argmax(1) != labels
    thin: dict[str, Any] = {"color": style.color, "linewidth": 0.9, "zorder": 1}
    ax.axhline(wrong.mean(), linestyle=":", **thin)
    coverage, risk = metrics.risk_coverage(probs, labels, uncertainty=wrong.astype(float))
    ax.plot(coverage, risk, linestyle=(0, (8, 3)), alpha=0.6, **thin)


def _legend(ax: Axes, *, bounds: bool) -> None:
    """Draw a legend above the curves with one entry per method, and one for each kind of bound."""
    handles, texts = ax.get_legend_handles_labels()
    explained: dict[Any, str] = {":": RANDOM, (0, (8, 3)): IDEAL} if bounds else {}
    for line, name in explained.items():
        handles.append(Line2D([], [], color=QUIET, linewidth=0.9, linestyle=line))
        texts.append(name)
    top = max(float(np.max(line.get_ydata())) for line in ax.lines)
    ax.set_ylim(0, (top or 1.0) / (1 - min(0.04 + ENTRY * len(texts), 0.6)))  # the legend hides no curve
    ax.legend(handles, texts, frameon=False, fontsize="small", loc="upper left")
