"""Groups of labeled data for ArviZ: draws, statistics of a sampler, and values per row."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..lora.subspace import Subspace
from ..metrics import Array
from ..prediction.inference_data import arviz_version, dataset, with_draws
from ..prediction.inference_data import to_arviz as to_arviz

if TYPE_CHECKING:
    import xarray as xr


def posterior_group(sites: Mapping[str, Array], subspace: Subspace) -> "xr.Dataset":
    """Make a dataset with dims (chain, draw, ...) from draws of the latent sites (chains, S, ...).

    ``s`` gets dims ``layer`` (module paths) and ``rank`` where all ranks are equal, else one dim ``latent``
    (``path[i]``) with the layer as a second coordinate.
    """
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for name, value in sites.items():
        value = np.asarray(value)
        if name != "s":
            own = [f"{name}_dim_{i}" for i in range(value.ndim - 2)]
            variables[name] = (("chain", "draw", *own), value)
        elif subspace.is_rectangular:
            rank = subspace.ranks[0]
            variables[name] = (("chain", "draw", "layer", "rank"), value.reshape(*value.shape[:2], -1, rank))
            coords |= {"layer": subspace.names, "rank": np.arange(rank)}
        else:
            variables[name] = (("chain", "draw", "latent"), value)
            coords["latent"] = subspace.labels()
            coords["latent_layer"] = ("latent", np.repeat(subspace.names, subspace.ranks))
    return with_draws(dataset(variables, coords=coords))


def sample_stats_group(statistics: Mapping[str, Array]) -> "xr.Dataset":
    """Make a dataset with dims (chain, draw) from what a sampler recorded (chains, S).

    Example:
        >>> sample_stats_group({"diverging": np.zeros((2, 5))})["diverging"].dtype
        dtype('bool')
    """
    kinds: dict[str, type] = {"diverging": bool, "tree_depth": int, "n_steps": int}
    values: dict[str, Array] = {
        name: np.asarray(value).astype(kinds.get(name, float)) for name, value in statistics.items()
    }
    return with_draws(dataset({name: (("chain", "draw"), value) for name, value in values.items()}))


def per_row_group(name: str, values: Array, rows: Array | None = None) -> "xr.Dataset":
    """Make a dataset of values (S, N) as ``name`` with dims (chain, draw, row).

    Args:
        name: Name of the variable.
        values: Values (S, N).
        rows: Coordinates (N,) of the rows. Default: 0 to N - 1.

    Example:
        >>> per_row_group("label", np.zeros((4, 3))).sizes["draw"]
        4
    """
    values = np.asarray(values)
    return with_draws(
        dataset({name: (("chain", "draw", "row"), values[None])}, coords={"row": _row_numbers(values.shape[1], rows)})
    )


def observed_group(name: str, values: Array, rows: Array | None = None) -> "xr.Dataset":
    """Make a dataset of observed values (N,) as ``name`` with dim row."""
    return dataset({name: ("row", np.asarray(values))}, coords={"row": _row_numbers(len(values), rows)})


def _row_numbers(count: int, rows: Array | None) -> Array:
    return np.arange(count) if rows is None else rows


def psislw(log_ratio: Array) -> tuple[Array, float]:
    """Compute Pareto-smoothed log weights (S,) and k-hat of log importance ratios (S,), as ``az.loo`` does.

    The generations differ by one draw in the length of the tail, hence in the third digit of k-hat. This function uses
    the installed one, so that LOO equals ``az.loo`` on the same draws.
    """
    if arviz_version() < (1, 0):
        import arviz

        smoothed, k = arviz.psislw(log_ratio)
    else:
        from arviz_stats.base import array_stats

        smoothed, k = array_stats.psislw(-log_ratio)  # this one takes log likelihoods and changes their sign
    return np.asarray(smoothed), float(k)
