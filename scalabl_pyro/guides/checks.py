"""Checks, before training, that a guide covers exactly the latent sites of a prior."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace

from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..priors import Prior
from .base import Guide


def check_sites(guide: Guide, prior: Prior) -> tuple[Trace, Trace]:
    """Check that the guide covers exactly the prior's latents.

    Args:
        guide: Guide to check.
        prior: Prior whose sites it must cover.

    Returns:
        A trace of the guide and a trace of the prior.

    Raises:
        ValueError: The guide misses a site, adds one, gives it another shape, or can leave its support; a site is not
            declared as one event; the prior does not return s; the guide has no mean of s.
        NotImplementedError: The guide does not define ``mean``.
    """
    with torch.no_grad(), scoped_seed(0), local_params():
        q, p = poutine.trace(guide).get_trace(), poutine.trace(prior).get_trace()
    sites: dict[str, Any] = {name: p.nodes[name] for name in p.stochastic_nodes}
    covered: dict[str, Any] = {name: q.nodes[name] for name in q.stochastic_nodes}
    if "s" not in sites:
        raise ValueError(f"The prior samples {sorted(sites)}, but not the site 's'.")
    _check_returns_s(p)
    if missing := sorted(set(sites) - set(covered)):
        raise ValueError(
            f"The guide does not sample {missing}: each latent of the prior needs a pyro.sample in the guide."
        )
    extra = [n for n in covered if n not in sites and not covered[n]["infer"].get("is_auxiliary")]
    if extra:
        raise ValueError(
            f"The guide samples {extra}, which the prior lacks: rename them to one of {sorted(sites)}, or mark them "
            "infer={'is_auxiliary': True}."
        )
    _check_events("prior", p)
    _check_events("guide", q)
    for name, site in sites.items():
        expected, got = site["value"].shape, covered[name]["value"].shape
        if expected != got:
            raise ValueError(f"Site {name!r} has shape {tuple(got)} in the guide, {tuple(expected)} in the prior.")
        if not site["fn"].support.check(covered[name]["value"]).all():
            raise ValueError(
                f"The guide puts {name!r} outside the support of its prior ({site['fn'].support}): choose a guide with "
                "that support, such as a Pyro AutoGuide."
            )
    _check_mean(guide, sites["s"]["value"].shape)
    return q, p


def _check_returns_s(prior: Trace) -> None:
    """Check that the prior returns its site s: the model computes with the return value, a posterior with the site."""
    returned, s = (_site(prior, name)["value"] for name in ("_RETURN", "s"))
    if not torch.is_tensor(returned) or not torch.equal(returned, s):
        given = f"a tensor of shape {tuple(returned.shape)}" if torch.is_tensor(returned) else repr(returned)
        raise ValueError(
            f"The prior must return its draw of s, but returns {given}: end forward() with "
            "return pyro.sample('s', ...)."
        )


def _check_events(what: str, trace: Trace) -> None:
    """Check that the latents of one draw are one event, so that any dimension left of them is a plate of draws."""
    for name in trace.stochastic_nodes:
        site = _site(trace, name)
        batch = tuple(site["fn"].batch_shape)
        if batch and (name == "s" or not site["cond_indep_stack"]):
            raise ValueError(
                f"Site {name!r} of the {what} has batch shape {batch}, but all its numbers belong to one draw: sample "
                f"it from dist.Normal(...).to_event({len(batch)}), or similar, outside of any plate."
            )


def _check_mean(guide: Guide, shape: torch.Size) -> None:
    """Check the mean before training, because the posterior needs it after training."""
    with torch.no_grad(), local_params():
        mean: Any = guide.mean()
    s = mean.get("s") if isinstance(mean, Mapping) else None
    if not torch.is_tensor(s) or s.shape != shape:
        given = f"'s' of shape {tuple(s.shape)}" if torch.is_tensor(s) else repr(mean)
        raise ValueError(
            f"{type(guide).__name__}.mean() must return a dict with the mean of each site, including 's' of shape "
            f"{tuple(shape)}, but it returned {given}."
        )


def _site(trace: Trace, name: str) -> dict[str, Any]:
    return cast(dict[str, Any], trace.nodes[name])
