"""Labeled groups as one object for ArviZ, for both of its generations.

ArviZ 0.x (Python 3.11) reads ``InferenceData``, ArviZ 1.x an ``xarray.DataTree``. Groups are built with xarray
alone, and always have the dimensions ``chain`` and ``draw``, which LOO and summary of both generations need.
"""

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.version import Version

if TYPE_CHECKING:
    import xarray as xr


def to_arviz(groups: Mapping[str, "xr.Dataset"], attrs: Mapping[str, Any]) -> Any:
    """Make ``InferenceData`` for ArviZ 0.x, or an ``xarray.DataTree`` for ArviZ 1.x, or where ArviZ is missing."""
    import xarray as xr

    tree = xr.DataTree.from_dict({name: group.assign_attrs(attrs) for name, group in groups.items()})
    if arviz_version() < (1, 0):
        import arviz

        return arviz.InferenceData.from_datatree(tree)
    return tree


def arviz_version() -> tuple[int, int]:
    """Find major and minor version of the installed ArviZ; (1, 0) where only its split packages are installed."""
    try:
        version = Version(importlib.metadata.version("arviz"))
    except importlib.metadata.PackageNotFoundError:
        return (1, 0)
    return version.major, version.minor


def dataset(variables: Mapping[str, Any], coords: Mapping[str, Any] | None = None) -> "xr.Dataset":
    """Make an ``xarray.Dataset``; xarray is imported when it is used."""
    import xarray as xr

    return xr.Dataset(variables, coords=coords)


def with_draws(data: "xr.Dataset") -> "xr.Dataset":
    """Return a dataset with numbered chains and draws."""
    return data.assign_coords(chain=np.arange(data.sizes["chain"]), draw=np.arange(data.sizes["draw"]))
