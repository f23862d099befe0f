"""The posterior of the latents, layer by layer."""

import numpy as np
from matplotlib.axes import Axes

from .._arguments import check_role, known_arguments
from .._errors import check_count
from ..lora.module_paths import block_of, last_name
from ..posterior.posterior import Posterior
from .style import QUIET, axes, cycled


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
    ax = axes(ax, width=9.0)
    s = posterior.sample(num_draws, seed=seed).s
    mean, sd = s.mean(0).numpy(), s.std(0).numpy()
    edges = np.cumsum([0, *posterior.subspace.ranks])
    kinds = [last_name(name) for name in posterior.subspace.names]
    palette = dict(zip(dict.fromkeys(kinds), cycled(ax), strict=False))
    for kind, start, stop in zip(kinds, edges[:-1], edges[1:], strict=True):
        x = np.arange(start, stop)
        color, marker = palette[kind]
        ax.errorbar(x, mean[x], yerr=sd[x], fmt=marker, markersize=2.5, linewidth=0.8, color=color)
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color=QUIET, linewidth=0.3, alpha=0.6)
    ax.axhline(0, color=QUIET, linewidth=0.8)
    blocks: dict[str, list[float]] = {}
    for name, middle in zip(posterior.subspace.names, (edges[:-1] + edges[1:] - 1) / 2, strict=True):
        blocks.setdefault(_block(name), []).append(middle)
    every = max(len(blocks) // 30, 1)
    ax.set_xticks([float(np.mean(x)) for x in blocks.values()][::every], list(blocks)[::every], fontsize=7)
    for label in ax.get_xticklabels():
        if not label.get_text().isdigit() and any(name.isdigit() for name in blocks):
            label.set_y(-0.05)  # below the numbers, which a name would cover
    for kind, (color, marker) in palette.items():
        ax.plot([], [], linestyle="", marker=marker, markersize=4, color=color, label=kind)
    ax.legend(frameon=False, ncols=min(len(palette), 4), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    ax.margins(x=0.01)
    ax.set(xlabel="block of the LLM, or name of a layer outside", ylabel="latent s: mean and standard deviation")
    ax.set_title(f"Posterior of the {len(mean)} latents", loc="left")
    return ax


def _block(path: str) -> str:
    """Return the index of the block in a path, or the last name if the path has no numbered block."""
    block = block_of(path)
    return last_name(path) if block is None else str(block.index)
