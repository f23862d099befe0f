"""Supports of latents: whether they are the real line, how to get there, and whether a value lies inside."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

logger = logging.getLogger(__name__)

#: Number of draws behind a median. It is odd, so that the median is a draw.
NUM_DRAWS = 101


def base_support(fn: Distribution) -> Any:
    """Return the support of one number of a site; of the whole vector if its numbers constrain each other."""
    support: Any = fn.support
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def is_real(fn: Distribution) -> bool:
    """Tell whether the support of a site is the whole real line, or the whole space."""
    return isinstance(base_support(fn), type(constraints.real))


def is_joint(fn: Distribution) -> bool:
    """Tell whether the numbers of a site constrain each other, as those of a simplex do."""
    return base_support(fn).event_dim > 0


def to_support(fn: Distribution) -> Any:
    """Return the transform from the real line to the support of a site.

    Raises:
        ValueError: Pyro knows no such transform.
    """
    try:
        return biject_to(base_support(fn))
    except NotImplementedError:
        raise ValueError(
            f"The support {describe_support(fn)} has no transform from the real line, which a guide of it needs. Write "
            "a guide whose draws lie in the support."
        ) from None


def start_inside(fn: Distribution, value: Tensor) -> Tensor:
    """Return initial values inside the support of a site.

    Numbers of ``value`` outside of the support are replaced by the median of the prior.

    Args:
        fn: Distribution of the site.
        value: Wanted initial values, with the shape of a draw.

    Raises:
        ValueError: The support has no transform from the real line, such as one with an infinite upper bound.
    """
    if is_real(fn) or is_joint(fn):
        return value
    transform = to_support(fn)
    outside = _is_outside(fn, transform, value)
    if not outside.any():
        return value
    with torch.no_grad():
        median = fn.sample(torch.Size((NUM_DRAWS,))).median(0).values.to(value)
    start = torch.where(outside, median, value)
    if _is_outside(fn, transform, start).any():
        raise ValueError(
            f"The support {describe_support(fn)} cannot be reached from the real line: Pyro's transform gives numbers "
            "that are not finite. Use a prior with finite bounds, or with one bound such as dist.HalfNormal."
        )
    logger.warning(
        "%d of %d latents would start outside of the support of the prior, %s: they start at its median",
        int(outside.sum()),
        outside.numel(),
        describe_support(fn),
    )
    return start


def describe_support(fn: Distribution) -> str:
    """Return the support in one short line, such as ``Interval(lower_bound=-3, upper_bound=3)``."""
    support = base_support(fn)
    names = [name for name in ("lower_bound", "upper_bound") if hasattr(support, name)]
    shown = ", ".join(f"{name}={_range(getattr(support, name))}" for name in names)
    return f"{type(support).__name__.lstrip('_')}({shown})"


def _is_outside(fn: Distribution, transform: Any, value: Tensor) -> Tensor:
    """Tell which numbers have no finite place on the real line."""
    inside = base_support(fn).check(value)
    free = transform.inv(torch.where(inside, value, value.new_tensor(float("nan"))))
    return ~(inside & free.isfinite() & transform(free).isfinite())


def _range(bound: Any) -> str:
    values = torch.as_tensor(bound, dtype=torch.float64)
    low, high = values.min().item(), values.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
