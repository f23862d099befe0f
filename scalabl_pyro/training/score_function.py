"""An ELBO for guides whose draws carry no gradient, such as masks: score functions with a baseline.

``Trace_ELBO`` is unbiased there too, but it multiplies the score of each row's draw by the ELBO of all rows, without a
baseline. Its gradient has many times the noise.
"""

from typing import Any, cast

import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .._errors import check_count
from ..guides.closed_form_kl import closed_kl


class LeaveOneOutELBO(Trace_ELBO):
    """The ELBO whose gradient is sum_k (f(s_k) - mean_{j != k} f(s_j)) d log q(s_k), for several draws per row.

    f is what the draw adds to the ELBO. The average over the other draws does not depend on s_k, so the gradient is
    unbiased. Draws of a row share its difficulty, which the difference removes. A KL in closed form is differentiated
    exactly. Sites with reparametrized draws get their usual gradient.

    Args:
        num_particles: Number of draws per row, or of shared draws, 1 or more. With one draw per row, the other rows
            are the baseline.
        vectorize: Whether the draws run in one pass.

    References:
        Kool et al., Buy 4 REINFORCE samples, get a baseline for free, ICLR workshop 2019.
    """

    def __init__(self, num_particles: int = 2, *, vectorize: bool = True) -> None:
        check_count(num_particles=num_particles)
        vectorize = vectorize and num_particles > 1
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=1)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the negative ELBO in nats per data set, with the unbiased gradient, ()."""
        parts = [_particle(p, q) for p, q in cast(Any, self)._get_traces(model, guide, args, kwargs)]
        values, costs, scores = zip(*parts, strict=True)
        total = torch.stack([*values]).sum()
        if scores[0] is not None:
            stack = torch.cat if self.vectorize_particles else torch.stack
            cost, score = stack([*costs]), stack([*scores])
            surrogate = ((cost - _others(cost)) * score).sum()
            total = total + (surrogate - surrogate.detach())
        return -total / self.num_particles


def is_reparametrized(guide_trace: Trace) -> bool:
    """Tell whether the draws of all sites of a guide carry a gradient."""
    return all(_site(guide_trace, name)["fn"].has_rsample for name in guide_trace.stochastic_nodes)


def _particle(p: Trace, q: Trace) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute what one pass adds to the ELBO.

    Returns:
        Sum to differentiate, (); the same without what no draw changes, for each draw; and log q of each draw, without
        any scale. The last two are None if all draws carry a gradient.
    """
    covered = {name: _site(q, name) for name in q.stochastic_nodes}
    latents = [name for name in p.stochastic_nodes if name in covered]
    terms = [_site(p, name)["log_prob"] for name in p.observation_nodes]
    fixed: Tensor | float = 0.0
    closed = closed_kl(covered[latents[0]], _site(p, latents[0])) if len(covered) == len(latents) == 1 else None
    if closed is not None:
        fixed = closed.sum()
    else:
        terms += [_site(p, name)["log_prob"] for name in latents]
        terms += [-_pathwise(site) for site in covered.values()]
    value = torch.stack([term.sum() for term in terms]).sum() - fixed
    scored = [site["unscaled_log_prob"] for site in covered.values() if not site["fn"].has_rsample]
    if not scored:
        return value, None, None
    score = sum(scored[1:], scored[0])
    cost = sum((_per_draw(term.detach(), score.shape) for term in terms), torch.zeros_like(score))
    return value, cost.detach(), score


def _pathwise(site: dict[str, Any]) -> Tensor:
    """Return log q of a site; without gradient where its draws have none, because its expected score is 0."""
    return site["log_prob"] if site["fn"].has_rsample else site["log_prob"].detach()


def _per_draw(term: Tensor, shape: torch.Size) -> Tensor:
    """Sum a term over the rows that share a draw."""
    return torch.broadcast_to(term, torch.broadcast_shapes(term.shape, shape)).sum_to_size(shape)


def _others(cost: Tensor) -> Tensor | float:
    """Average over the other draws of the same row; with one draw per row, over the other rows.

    Args:
        cost: What each draw adds to the ELBO, (draws,) or (draws, rows).
    """
    for dim in range(min(cost.dim(), 2)):
        if (count := cost.shape[dim]) > 1:
            return (cost.sum(dim, keepdim=True) - cost) / (count - 1)
    return 0.0


def _site(trace: Trace, name: str) -> dict[str, Any]:
    return cast(dict[str, Any], trace.nodes[name])
