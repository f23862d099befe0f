"""Pyro's ELBOs as tensors on the device: the same number, for which the host need not wait."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..guides.closed_form_kl import closed_kl


def stays_on_device(elbo: ELBO) -> bool:
    """Whether :func:`device_loss` can compute this estimator. Others use their own ``differentiable_loss``."""
    return type(elbo) in (Trace_ELBO, TraceMeanField_ELBO)


def device_loss(elbo: ELBO, model: Any, guide: Any, *args: Any) -> Tensor | None:
    """Compute the negative ELBO to differentiate.

    It equals ``elbo.differentiable_loss(model, guide, *args)``. Pyro's method reads its value on the host: the host
    waits for the GPU twice per step, which a CUDA graph does not allow.

    Returns:
        () Negative ELBO, nats per data set; None if a site of the guide has no reparametrized draws.
    """
    total: Tensor | float = 0.0
    for loss in device_losses(elbo, model, guide, args, {}):
        if loss is None:
            return None
        total = total + loss
    return torch.as_tensor(total / cast(Any, elbo).num_particles)


def device_losses(
    elbo: ELBO, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Tensor | float | None]:
    """Compute the negative ELBO of one draw of the guide after another, so that each can be differentiated alone.

    Yields:
        () Negative ELBO, nats per data set, of all vectorized draws together or of one of the others; None, and
        nothing behind it, if a site of the guide has no reparametrized draws.
    """
    for p, q in cast(Any, elbo)._get_traces(model, guide, args, kwargs):
        if not all(_is_reparametrized(site) for site in _samples(q).values()):
            yield None
            return
        yield -_particle(p, q, closed=isinstance(elbo, TraceMeanField_ELBO))


def _particle(p: Trace, q: Trace, *, closed: bool) -> Tensor | float:
    """Log p(y, s) - log q(s) of one draw, with closed-form KLs if ``closed`` is set and the KL is known."""
    elbo: Tensor | float = 0.0
    covered = _samples(q)
    for name, site in _samples(p).items():
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        of_q = covered.pop(name)
        known = closed_kl(of_q, site) if closed else None
        if known is None:
            elbo = elbo - (_sum(of_q["score_parts"].entropy_term) - site["log_prob_sum"])
        else:
            elbo = elbo - known.sum()
    return elbo - sum(_sum(site["score_parts"].entropy_term) for site in covered.values())  # auxiliary sites


def _samples(trace: Trace) -> dict[str, dict[str, Any]]:
    sites = {name: cast(dict[str, Any], trace.nodes[name]) for name in trace.nodes}
    return {name: site for name, site in sites.items() if site["type"] == "sample"}


def _is_reparametrized(site: dict[str, Any]) -> bool:
    score = site["score_parts"].score_function
    return not torch.is_tensor(score) and score == 0


def _sum(x: Tensor | float) -> Tensor | float:
    return x.sum() if torch.is_tensor(x) else x
