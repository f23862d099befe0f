"""Posteriors as labeled data for ArviZ, whichever generation is installed.

ArviZ 0.x (Python 3.11) reads ``InferenceData``, ArviZ 1.x an ``xarray.DataTree``. Groups are built with xarray
alone, always with ``chain`` and ``draw``: LOO and summary of both generations need them.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from packaging.version import Version

from ..lora.subspace import Subspace

Array = NDArray[Any]


def posterior_group(sites: Mapping[str, Array], subspace: Subspace) -> xr.Dataset:
    """Draws of the latent sites (chains, S, ...) as a dataset with dims (chain, draw, ...).

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
    return _with_draws(xr.Dataset(variables, coords=coords))


def per_row_group(name: str, values: Array) -> xr.Dataset:
    """Values (S, N) of each draw and row as ``name`` with dims (chain, draw, row)."""
    values = np.asarray(values)
    return _with_draws(
        xr.Dataset({name: (("chain", "draw", "row"), values[None])}, coords={"row": np.arange(values.shape[1])})
    )


def observed_group(name: str, values: Array) -> xr.Dataset:
    """Observed values (N,) as ``name`` with dim row."""
    return xr.Dataset({name: ("row", np.asarray(values))}, coords={"row": np.arange(len(values))})


def to_arviz(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> Any:
    """What the installed ArviZ reads: ``InferenceData`` (0.x), or an ``xarray.DataTree`` (1.x, or without ArviZ)."""
    tree = xr.DataTree.from_dict({name: group.assign_attrs(attrs) for name, group in groups.items()})
    if arviz_version() < (1, 0):
        import arviz

        return arviz.InferenceData.from_datatree(tree)
    return tree


def psislw(log_ratio: Array) -> tuple[Array, float]:
    """Pareto-smoothed log weights (S,) and k-hat of log importance ratios (S,), as ``az.loo`` of this ArviZ has them.

    The generations differ by one draw in the length of the tail, hence in the third digit of k-hat; a LOO of ours that
    is not that of ``az.loo`` on the same draws would be a riddle.
    """
    if arviz_version() < (1, 0):
        import arviz

        smoothed, k = arviz.psislw(log_ratio)
    else:
        from arviz_stats.base import array_stats

        smoothed, k = array_stats.psislw(-log_ratio)  # takes log likelihoods and turns their sign itself
    return np.asarray(smoothed), float(k)


def arviz_version() -> tuple[int, int]:
    """Major and minor version of the installed ArviZ; (1, 0) where only its split packages are there."""
    try:
        version = Version(importlib.metadata.version("arviz"))
    except importlib.metadata.PackageNotFoundError:
        return (1, 0)
    return version.major, version.minor


def _with_draws(data: xr.Dataset) -> xr.Dataset:
    return data.assign_coords(chain=np.arange(data.sizes["chain"]), draw=np.arange(data.sizes["draw"]))
