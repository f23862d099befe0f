"""Uncertainty of rows like the training data, and of rows from elsewhere."""

from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes

from .. import metrics
from .._arguments import check_role, known_arguments
from ..prediction.scores import ClassScores, NumberScores
from .style import MARK, WARM, axes, visible

Kind = Literal["total", "aleatoric", "epistemic"]
"""Kinds of uncertainty."""


@known_arguments
def uncertainty_histogram(
    inside: ClassScores | NumberScores,
    outside: ClassScores | NumberScores,
    *,
    kind: Kind = "total",
    ax: Axes | None = None,
) -> Axes:
    """Plot histograms of the uncertainty of in-distribution and out-of-distribution rows.

    The title gives the AUROC of the uncertainty as a score that separates the two groups.

    Args:
        inside: Prediction of in-distribution rows.
        outside: Prediction of out-of-distribution rows.
        kind: Kind of uncertainty: ``"total"``, ``"aleatoric"`` or ``"epistemic"``.
        ax: Axes to draw on; None for new ones.

    Returns:
        The axes.

    Example:
        >>> scalabl_pyro.plots.uncertainty_histogram(inside, outside, kind="epistemic")
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is unknown: use 'total', 'aleatoric' or 'epistemic'.")
    kinds = (ClassScores, NumberScores)  # with or without draws: only uncertainties are read
    check_role("inside", inside, "prediction", kind=kinds)
    check_role("outside", outside, "prediction", kind=kinds)
    if inside.HAS_CLASSES != outside.HAS_CLASSES:
        raise TypeError(
            f"inside is a {type(inside).__name__} and outside is a {type(outside).__name__}: their uncertainties have "
            "different units. Pass two predictions of the same type."
        )
    ax = axes(ax)
    a, b = getattr(inside, kind), getattr(outside, kind)
    bins = np.linspace(0, max(a.max(), b.max(), 1e-9), 31).tolist()
    blue, red = visible(MARK, ax), visible(WARM, ax)
    ax.hist(a, bins=bins, density=True, color=blue, alpha=0.55, label=f"in distribution ({len(a)} rows)")
    outline: dict[str, Any] = {"facecolor": "none", "edgecolor": red, "hatch": "////", "linewidth": 0.8}
    ax.hist(b, bins=bins, density=True, **outline, label=f"out of distribution ({len(b)} rows)")
    unit = "nats" if inside.HAS_CLASSES else "variance"
    ax.set(
        xlabel=f"{kind} uncertainty ({unit})",
        ylabel="density of rows",
        title=f"OOD AUROC {metrics.ood_auroc(a, b):.3f}",
    )
    ax.legend(frameon=False)
    return ax
