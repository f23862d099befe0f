"""Plots of a fit and of its predictions.

Each function draws on the given axes, or on new ones, and returns the axes. It does not show or save the figure.
"""

import itertools
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from . import metrics
from ._arguments import check_role, known_arguments
from ._errors import check_count, describe
from .lora.module_paths import block_of, last_name
from .posterior.posterior import Posterior
from .prediction.result import NumericPrediction, Prediction

Kind = Literal["total", "aleatoric", "epistemic"]
"""Kinds of uncertainty."""

MARK = "#0b4f8a"
QUIET = "#9aa5b1"
WARM = "#c8553d"


@known_arguments
def reliability(prediction: Prediction, *, ax: Axes | None = None, label: str | None = None, color: str = MARK) -> Axes:
    """Plot accuracy against confidence in 15 bins; the area of a marker shows the number of rows in the bin.

    Args:
        prediction: Prediction of rows with answers.
        ax: Axes to draw on; None for new ones.
        label: Legend entry. The expected calibration error (ECE) is added to it.
        color: Color of the markers.

    Returns:
        The axes.

    Example:
        >>> scalabl_pyro.plots.reliability(prediction)
    """
    probs, target = _scored(prediction)
    ax = _axes(ax)
    table = metrics.reliability(probs, target)
    ece = metrics.ece(probs, target)
    if not ax.collections:
        ax.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--", zorder=0)
    name = f"{label}: ECE {100 * ece:.1f} %" if label else f"ECE {100 * ece:.1f} %"
    ax.scatter(
        table["confidence"],
        table["accuracy"],
        s=300 * table["count"] / len(target),
        color=color,
        alpha=0.55,
        linewidths=0,
    )
    ax.plot([], [], "o", color=color, alpha=0.55, label=name)  # a legend marker of fixed size
    ax.set(
        xlabel="confidence (top probability)", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title="Reliability"
    )
    ax.legend(frameon=False, loc="lower right")
    return ax


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
    ax = _axes(ax)
    parts = {
        "loss = NLL + KL": (frame["loss"], MARK),
        "NLL": (frame["nll"], WARM),
        "KL": (frame["loss"] - frame["nll"], QUIET),
    }
    for name, (values, color) in parts.items():
        ax.plot(frame["step"], values, color=color, alpha=0.25, linewidth=0.8)
        ax.plot(frame["step"], values.rolling(smooth, min_periods=1).mean(), color=color, linewidth=1.5, label=name)
    ax.set(xlabel="step", ylabel="nats per example", title="Negative ELBO")
    ax.set_ylim(bottom=min(0, *(float(values.min()) for values, _ in parts.values())))
    ax.legend(frameon=False)
    return ax


@known_arguments
def posterior_by_layer(posterior: Posterior, *, ax: Axes | None = None, num_draws: int = 500, seed: int = 0) -> Axes:
    """Plot the mean and standard deviation of each latent, layer by layer.

    Args:
        posterior: Fitted posterior.
        ax: Axes to draw on; None for new ones.
        num_draws: Number of draws to estimate the mean and standard deviation from, 2 or more.
        seed: Seed of the draws.

    Returns:
        The axes.

    Example:
        >>> scalabl_pyro.plots.posterior_by_layer(result.posterior)
    """
    check_role("posterior", posterior, "posterior")
    check_count(num_draws=num_draws, least=2)
    ax = _axes(ax, width=9.0)
    s = posterior.sample(num_draws, seed=seed).s
    mean, sd = s.mean(0).numpy(), s.std(0).numpy()
    edges = np.cumsum([0, *posterior.subspace.ranks])
    kinds = [last_name(name) for name in posterior.subspace.names]
    colors = [MARK, WARM, "#3d7d4f", "#7d4f9e", "#b58a1b", QUIET, "#1f9ea8", "#d06ca8", "#6b4a2b", "#444444"]
    palette = dict(zip(dict.fromkeys(kinds), itertools.cycle(colors), strict=False))
    for kind, start, stop in zip(kinds, edges[:-1], edges[1:], strict=True):
        x = np.arange(start, stop)
        ax.errorbar(x, mean[x], yerr=sd[x], fmt=".", markersize=3, linewidth=0.8, color=palette.get(kind, QUIET))
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color=QUIET, linewidth=0.3, alpha=0.6)
    ax.axhline(0, color=QUIET, linewidth=0.8)
    blocks: dict[str, list[float]] = {}
    for name, middle in zip(posterior.subspace.names, (edges[:-1] + edges[1:] - 1) / 2, strict=True):
        blocks.setdefault(_block(name), []).append(middle)
    every = max(len(blocks) // 30, 1)
    ax.set_xticks([float(np.mean(x)) for x in blocks.values()][::every], list(blocks)[::every], fontsize=7)
    for kind, color in palette.items():
        ax.plot([], [], ".", color=color, label=kind)
    ax.legend(frameon=False, ncols=min(len(palette), 4), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    ax.margins(x=0.01)
    ax.set(xlabel="block", ylabel="s (mean and sd)")
    ax.set_title(f"Posterior of the {len(mean)} latents", loc="left")
    return ax


@known_arguments
def uncertainty_histogram(
    inside: Prediction | NumericPrediction,
    outside: Prediction | NumericPrediction,
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
    check_role("inside", inside, "prediction")
    check_role("outside", outside, "prediction")
    if type(inside) is not type(outside):
        raise TypeError(
            f"inside is a {type(inside).__name__} and outside is a {type(outside).__name__}: their uncertainties have "
            "different units. Pass two predictions of the same type."
        )
    ax = _axes(ax)
    a, b = getattr(inside, kind), getattr(outside, kind)
    bins = np.linspace(0, max(a.max(), b.max(), 1e-9), 31).tolist()
    ax.hist(a, bins=bins, density=True, color=MARK, alpha=0.55, label="in distribution")
    ax.hist(b, bins=bins, density=True, color=WARM, alpha=0.55, label="out of distribution")
    unit = "nats" if isinstance(inside, Prediction) else "variance"
    ax.set(xlabel=f"{kind} uncertainty ({unit})", ylabel="density", title=f"OOD AUROC {metrics.ood_auroc(a, b):.3f}")
    ax.legend(frameon=False)
    return ax


@known_arguments
def risk_coverage(
    prediction: Prediction,
    *,
    uncertainty: metrics.Array | None = None,
    ax: Axes | None = None,
    label: str | None = None,
    color: str = MARK,
) -> Axes:
    """Plot the error of the answered rows against the share of rows that are answered, most certain rows first.

    Args:
        prediction: Prediction of rows with answers.
        uncertainty: Score that orders the rows, (N,), such as ``prediction.epistemic``. None means 1 - maximum
            probability.
        ax: Axes to draw on; None for new ones.
        label: Legend entry. The area under the curve is added to it.
        color: Color of the line.

    Returns:
        The axes.

    Example:
        >>> scalabl_pyro.plots.risk_coverage(prediction, uncertainty=prediction.epistemic)
    """
    probs, target = _scored(prediction)
    if uncertainty is not None and np.shape(uncertainty) == prediction.is_answered.shape:
        uncertainty = np.asarray(uncertainty)[prediction.is_answered]
    coverage, risk = metrics.risk_coverage(probs, target, uncertainty=uncertainty)
    ax = _axes(ax)
    name = f"area {risk.mean():.3f}" if label is None else f"{label}: area {risk.mean():.3f}"
    ax.plot(coverage, risk, color=color, label=name)
    ax.set(xlabel="coverage", ylabel="error among answered", xlim=(0, 1), title="Selective prediction")
    ax.set_ylim(bottom=0, auto=True)  # a higher curve that is added later still fits
    ax.legend(frameon=False)
    return ax


def _scored(prediction: Prediction) -> tuple[metrics.Array, metrics.Labels]:
    check_role("prediction", prediction, "prediction")
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"prediction is a {type(prediction).__name__}, but this plot needs class probabilities. Pass a Prediction "
            "of a classification task."
        )
    answered = prediction.with_answers()
    return answered.probs, cast(metrics.Labels, answered.target)


def _axes(ax: Axes | None, *, width: float = 4.5) -> Axes:
    if ax is not None:
        return ax
    options: dict[str, Any] = {"figsize": (width, 3.6), "layout": "constrained"}
    return plt.subplots(**options)[1]


def _block(path: str) -> str:
    """Return the index of the block in a path, or the last name if the path has no numbered block."""
    block = block_of(path)
    return last_name(path) if block is None else str(block.index)
