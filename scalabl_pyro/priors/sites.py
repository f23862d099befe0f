"""The latent sites of a prior: their distributions and medians, and checks of their supports."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch.distributions import biject_to

from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from .base import Prior
from .supports import NUM_DRAWS, describe_support


def prior_sites(prior: Prior) -> dict[str, dict[str, Any]]:
    """Return the latent sites of a prior, in the order in which it samples them.

    Returns:
        Sites by name, each with its distribution ``fn`` and its ``median``, which is estimated from 101 draws.
    """
    with torch.no_grad(), scoped_seed(0), local_params():
        traces = [poutine.trace(prior).get_trace() for _ in range(NUM_DRAWS)]
    sites: dict[str, dict[str, Any]] = {}
    for name in traces[0].stochastic_nodes:
        nodes: list[Any] = [trace.nodes[name] for trace in traces]
        median = torch.stack([node["value"].detach() for node in nodes]).median(0).values
        sites[name] = {"fn": nodes[0]["fn"], "median": median}
    return sites


def check_continuous(what: str, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if a latent site is discrete, which only a guide made for it can cover.

    Args:
        what: Name of the guide in the message.
        sites: Sites of the prior by name, see :func:`prior_sites`.

    Raises:
        ValueError: A site is discrete.
    """
    for name in (name for name, site in sites.items() if site["fn"].support.is_discrete):
        advice = "masks need guide='rank_mask'" if name == "s" else f"write a guide for {name!r}, which is discrete"
        raise ValueError(f"{what} needs latents on the real line; {advice}.")


def check_transforms(what: str, sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if Pyro has no transform from the real line to the support of a site.

    Args:
        what: Name of the guide or sampler in the message.
        sites: Sites of the prior by name, see :func:`prior_sites`.

    Raises:
        ValueError: A site has such a support.
    """
    for name, site in sites.items():
        try:
            biject_to(site["fn"].support)
        except NotImplementedError:
            raise ValueError(
                f"{what} has no transform from the real line to the support of {name!r}, "
                f"{describe_support(site['fn'])}. Sample a subclass of the distribution that states its support, such "
                "as support = constraints.real."
            ) from None
