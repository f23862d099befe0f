"""The latent sites of a prior: their distributions and medians, and whether a continuous guide can cover them."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine

from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from .base import Prior


def prior_sites(prior: Prior) -> dict[str, dict[str, Any]]:
    """Latent sites of a prior in its order, each with its distribution ``fn`` and the ``median`` of 101 draws."""
    with torch.no_grad(), scoped_seed(0), local_params():
        traces = [poutine.trace(prior).get_trace() for _ in range(101)]
    sites: dict[str, dict[str, Any]] = {}
    for name in traces[0].stochastic_nodes:
        nodes: list[Any] = [trace.nodes[name] for trace in traces]
        median = torch.stack([node["value"].detach() for node in nodes]).median(0).values
        sites[name] = {"fn": nodes[0]["fn"], "median": median}
    return sites


def check_continuous(what: str, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse discrete latents, which only a guide of their own can cover.

    Args:
        what: the family that cannot, as the message calls it.
        sites: of the prior, by name, see :func:`prior_sites`.

    Raises:
        ValueError: one of them is discrete.
    """
    for name in (name for name, site in sites.items() if site["fn"].support.is_discrete):
        way_out = "masks need guide='rank_mask'" if name == "s" else f"write a guide for {name!r}, which is discrete"
        raise ValueError(f"{what} needs latents on the real line; {way_out}.")
