"""Checks, before training, that a guide covers exactly the latent sites of a prior."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution
from torch.distributions.transforms import AffineTransform

from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..priors import Prior
from ..priors.supports import base_support, describe_support, is_joint, is_real, to_support
from .base import Guide

#: A point far out on the real line, in float32 still away from the border after exp or sigmoid.
FAR = 10.0


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
        _check_density(name, site["fn"], site["value"])
        if _may_leave(covered[name], site["fn"]):
            raise ValueError(
                f"The guide puts {name!r} outside the support of its prior ({describe_support(site['fn'])}), or can do "
                "so: choose a guide with that support, such as guide='normal' or a Pyro AutoGuide."
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


def _check_density(name: str, fn: Any, value: Tensor) -> None:
    """Check that a transformed prior that claims the real line can reach far numbers.

    torch takes the codomain of the last transform for the support, so it calls 6 sigmoid(x) - 3 real.
    """
    if not is_real(fn):
        return
    _, transforms = _base_and_transforms(fn)
    for far in (-FAR, FAR):
        wanted = torch.full_like(value, far)
        reached = wanted
        for transform in reversed(transforms):
            reached = transform.inv(reached)
        for transform in transforms:
            reached = transform(reached)
        if not torch.allclose(reached, wanted, rtol=1e-2):
            raise ValueError(
                f"Site {name!r} of the prior claims the real line as its support, but its transforms cannot reach "
                f"{far:g}. Sample a subclass of the distribution that states its support, such as "
                "support = constraints.interval(-1.0, 1.0)."
            )


def _may_leave(covered: Mapping[str, Any], prior: Any) -> bool:
    """Tell whether the guide can draw outside of the support of the prior."""
    if not prior.support.check(covered["value"]).all():
        return True
    q = _base(covered["fn"])
    # An AutoGuide carries a draw to the support itself, and puts it at the site as a point.
    if isinstance(q, dist.Delta) or is_real(prior) or is_joint(prior) or q.support.is_discrete:
        return False
    return not all(base_support(prior).check(value).all() for value in _far_draws(q, covered["value"]))


def _far_draws(q: Any, like: Tensor) -> Iterator[Tensor]:
    """Give a very small and a very large draw of a distribution, in dtype and device of ``like``."""
    q, transforms = _base_and_transforms(q)
    is_line = is_real(q) and all(isinstance(transform, AffineTransform) for transform in transforms)
    for far in (-1e9, 1e9) if is_line else (-FAR, FAR):  # a larger number would be rounded to the border
        value = to_support(q)(torch.full(q.batch_shape + q.event_shape, far).to(like))
        for transform in transforms:
            value = transform(value)
        yield value


def _base_and_transforms(fn: Any) -> tuple[Any, list[Any]]:
    """Return the innermost distribution and the transforms of its draws, in their order.

    A class that states its own support, such as Gumbel, counts as innermost: nothing has to be derived from transforms.
    """
    transforms: list[Any] = []
    fn = _base(fn)
    while isinstance(fn, TransformedDistribution) and type(fn).support is TransformedDistribution.support:
        transforms = [*fn.transforms, *transforms]
        fn = _base(fn.base_dist)
    return fn, transforms


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


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
