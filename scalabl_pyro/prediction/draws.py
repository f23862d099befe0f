"""Draws of a posterior on the CPU, made one by one, so that draw i does not depend on the number of draws."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .._display import Summarized
from .._process.full_precision import full_precision
from .._process.memory import check_memory
from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..guides import Guide
from ..priors import Prior
from .room import COPIES, FEWER, OVERHEAD, size_of


@dataclass(frozen=True, repr=False)
class Draws(Summarized):
    """S posterior draws on the CPU. Draw i is the same vector whatever S is.

    Attributes:
        sites: Draws by latent site, each (S, ...); ``"s"`` is (S, D).
        log_q: Log density (S,) of each draw under the guide, or None where the family has no density.
        seed: Seed that reproduces the draws.
        is_mean: Whether the only draw is the posterior mean.

    Example:
        >>> draws = posterior.sample(4, seed=0)
        >>> len(draws), draws.s.shape == (4, posterior.subspace.dim)
        (4, True)
    """

    sites: Mapping[str, Tensor]
    log_q: Tensor | None = None
    seed: int = 0
    is_mean: bool = False

    @property
    def s(self) -> Tensor:
        """Draws (S, D) of s."""
        return self.sites["s"]

    def first(self, count: int) -> "Draws":
        """Return the first ``count`` draws."""
        log_q = None if self.log_q is None else self.log_q[:count]
        return replace(self, sites={name: value[:count] for name, value in self.sites.items()}, log_q=log_q)

    def __len__(self) -> int:
        return len(self.s)

    def _summary(self) -> Mapping[str, object]:
        sites = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.sites.items())
        return {"draws": 0 if self.is_mean else len(self), "sites": sites, "seed": self.seed}


def sample(guide: Guide, num_draws: int, *, seed: int) -> Draws:
    """Draw from a guide.

    Args:
        guide: Guide to draw from.
        num_draws: Number S of draws; 0 gives the mean of the guide as the only draw.
        seed: Seed of the draws.
    """
    if num_draws == 0:
        with torch.no_grad(), local_params(), full_precision():
            sites = {name: value.detach().clone().unsqueeze(0) for name, value in guide.mean().items()}
        return Draws(sites, seed=seed, is_mean=True)
    with full_precision():
        sites, log_q = guide.sample_and_log_prob(num_draws, seed=seed)
    return Draws(sites, log_q=log_q, seed=seed)


def sample_in_parts(guide: Guide, num_draws: int, *, size: int, seed: int) -> Iterator[Draws]:
    """Draw from a guide, a part at a time; the draws are those of :func:`sample`, without their densities.

    Args:
        guide: Guide to draw from.
        num_draws: Number S of draws; 0 gives the mean of the guide as the only draw.
        size: Number of draws per part. The last part may have fewer.
        seed: Seed of the draws.

    Yields:
        Draws of one part.
    """
    if num_draws == 0:
        yield sample(guide, 0, seed=seed)
        return
    parts = guide.sample_in_parts(num_draws, size=size, seed=seed)
    while True:
        with full_precision():
            sites = next(parts, None)
        if sites is None:
            return
        yield Draws(sites, seed=seed)


def sample_prior(prior: Prior, num_draws: int, *, seed: int) -> Tensor:
    """Draw s (S, D) from the prior."""
    return sample_prior_sites(prior, num_draws, seed=seed)["s"]


def sample_prior_sites(prior: Prior, num_draws: int, *, seed: int) -> dict[str, Tensor]:
    """Draw all latent sites from the prior, each (S, ...)."""
    with torch.no_grad(), local_params(), full_precision(), scoped_seed(seed):
        draws = [_latents(poutine.trace(prior).get_trace())]
        size = OVERHEAD * len(draws[0]) + COPIES * size_of(draws[0])
        check_memory(f"{num_draws:,} draws of the prior", num_draws * size, FEWER)
        draws += [_latents(poutine.trace(prior).get_trace()) for _ in range(num_draws - 1)]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def _latents(trace: Any) -> dict[str, Tensor]:
    return {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}


def log_prior(prior: Prior, draws: Draws) -> Tensor:
    """Compute the log density (S,) of each draw of all latent sites under the prior."""
    values = []
    for i in range(len(draws)):
        sites = {name: value[i] for name, value in draws.sites.items()}
        values.append(torch.as_tensor(poutine.trace(poutine.condition(prior, data=sites)).get_trace().log_prob_sum()))
    return torch.stack(values)
