"""Draws from a guide on the CPU, one by one, so that draw i is the same vector whatever else is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..guides import EmpiricalGuide, Guide, MixtureGuide
from ..priors import Prior


@dataclass(frozen=True)
class Draws:
    """S posterior draws on the CPU; draw i is the same vector whatever S is.

    Attributes:
        sites: latent site -> (S, ...); ``"s"`` is (S, D).
        log_q: (S,) log density of each draw, or None where the family has none.
        seed: that gives them again.
        is_mean: whether the only draw is the posterior mean.
    """

    sites: Mapping[str, Tensor]
    log_q: Tensor | None = None
    seed: int = 0
    is_mean: bool = False

    @property
    def s(self) -> Tensor:
        """(S, D)."""
        return self.sites["s"]

    def __len__(self) -> int:
        return len(self.s)


def sample(guide: Guide, num_draws: int, *, seed: int) -> Draws:
    """Draw from a guide; 0 draws give its mean as the only one."""
    with torch.no_grad(), local_params():
        if num_draws == 0:
            sites = {k: v.detach().clone().unsqueeze(0) for k, v in guide.mean().items()}
            return Draws(sites, seed=seed, is_mean=True)
        if isinstance(guide, EmpiricalGuide):
            order = torch.randperm(len(guide), generator=torch.Generator().manual_seed(seed)).tolist()
            points = [guide.at(order[i % len(order)]) for i in range(num_draws)]
            return Draws({name: torch.stack([p[name] for p in points]) for name in guide.sites}, seed=seed)
        with scoped_seed(seed), pyro.validation_enabled(False):
            traces = [poutine.trace(guide).get_trace() for _ in range(num_draws)]
            values = [_latents(trace) for trace in traces]
            log_q = _log_q(guide, traces, values)  # still unvalidated: a draw that is NaN has a density that is NaN
    return Draws({n: torch.stack([draw[n] for draw in values]) for n in values[0]}, log_q=log_q, seed=seed)


def sample_prior(prior: Prior, num_draws: int, *, seed: int) -> Tensor:
    """(S, D) draws of s from the prior."""
    with torch.no_grad(), local_params(), scoped_seed(seed):
        return torch.stack([prior() for _ in range(num_draws)])


def log_prior(prior: Prior, draws: Draws) -> Tensor:
    """(S,) log density of each draw of all latent sites under the prior."""
    values = []
    for i in range(len(draws)):
        sites = {name: value[i] for name, value in draws.sites.items()}
        values.append(torch.as_tensor(poutine.trace(poutine.condition(prior, data=sites)).get_trace().log_prob_sum()))
    return torch.stack(values)


def _log_q(guide: Guide, traces: list[Any], values: list[dict[str, Tensor]]) -> Tensor | None:
    if not guide.has_density:
        return None
    if isinstance(guide, MixtureGuide):
        return torch.stack([guide.log_prob(draw) for draw in values])
    return torch.stack([torch.as_tensor(trace.log_prob_sum()) for trace in traces])


def _latents(trace: Any) -> dict[str, Tensor]:
    """Values of the latent sites of a guide's trace, without auxiliary ones."""
    names = [n for n in trace.stochastic_nodes if not trace.nodes[n]["infer"].get("is_auxiliary")]
    return {name: trace.nodes[name]["value"].detach() for name in names}
