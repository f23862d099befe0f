"""The reference posterior: NUTS on the latents with A and B held fixed, on the whole data set."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from arviz_stats.base import array_stats
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from .._errors import check_positive
from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..data.batch import Batch
from ..data.encoding import encode
from ..data.rows import read_rows
from ..guides import EmpiricalGuide
from ..model.log_likelihood import LogLikelihood
from ..posterior.posterior import Posterior
from ..priors import Prior
from ..priors.sites import prior_sites

logger = logging.getLogger(__name__)

#: Shorter warm-ups adapt the step size alone. Pyro estimates the mass matrix in the middle of the warm-up and then
#: starts the step size anew, so that few steps would leave a poor mass, and a step size that is hardly adapted to it.
MIN_MASS_WARMUP = 50


def mcmc(
    posterior: Posterior,
    data: Any,
    *,
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 2,
    batch_size: int = 64,
    jitter: float = 0.1,
    max_tree_depth: int = 10,
    target_accept: float = 0.8,
    seed: int = 0,
    progress: bool = True,
) -> Posterior:
    """Sample p(s | data, A, B) by the no-U-turn sampler of Pyro, for small models and data.

    It is what every guide is judged against: it shares the factors, the prior and the likelihood with ``posterior`` and
    assumes no family. Each gradient is a pass over all of ``data``, so cost is about
    num_chains * (num_samples + warmup_steps) * 10 to 100 such passes.

    Args:
        posterior: gives factors, prior, task, and where chains start.
        data: all training rows; not a minibatch, for which the sampler would not be valid.
        num_samples: draws kept of each chain.
        warmup_steps: steps that adapt step size and, where they are 50 or more, mass; not kept.
        num_chains: run one after the other.
        batch_size: rows a pass through the LLM; bounds memory alone, though what the blocks below the first adapted one
            give is kept for all rows.
        jitter: standard deviation of a chain's start around the posterior mean.
        max_tree_depth: at most 2^depth gradients a step.
        target_accept: acceptance probability that the step size adapts to.
        seed: of starts and draws; the global random state is left alone.
        progress: show Pyro's progress bar.

    Returns:
        A posterior whose draws are those of the chains, with ``r_hat`` (largest), ``ess`` (smallest) and
        ``divergences`` in its provenance. ``to_arviz()`` keeps the chains.

    Raises:
        ValueError: ``data`` yields batches instead of rows, a prior with a discrete site, or an option outside its
            range.

    References:
        Hoffman and Gelman, The No-U-Turn Sampler, JMLR 2014.
    """
    if num_samples < 4:  # R-hat needs them
        raise ValueError(f"num_samples={num_samples} must be positive, and num_samples 4 or more.")
    check_positive(
        warmup_steps=warmup_steps, num_chains=num_chains, batch_size=batch_size, max_tree_depth=max_tree_depth
    )
    if not 0 < target_accept < 1:
        raise ValueError(f"target_accept={target_accept} must lie between 0 and 1: it is a probability.")
    if jitter < 0:
        raise ValueError(f"jitter={jitter}: a standard deviation must be 0 or more.")
    _check_continuous(posterior.prior)
    rows = read_rows(data)
    if isinstance(rows[0], Batch):
        raise ValueError("data yields batches, but NUTS needs the density of the whole data set: pass its rows.")
    examples = encode(rows, posterior.task.encode, need_target=True)
    likelihood = LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size, cache_prefix=True)
    start = {name: value.detach() for name, value in _means(posterior).items()}
    chains: list[dict[str, Tensor]] = []
    divergences = 0
    with local_params(), torch.enable_grad():
        for chain in range(num_chains):
            with scoped_seed(seed + chain):
                moved = {name: _jittered(posterior.prior, name, value, jitter) for name, value in start.items()}
                kernel = NUTS(
                    _FullData(posterior.prior, likelihood),
                    init_strategy=init_to_value(values=moved),
                    max_tree_depth=max_tree_depth,
                    adapt_mass_matrix=warmup_steps >= MIN_MASS_WARMUP,
                    target_accept_prob=target_accept,
                )
                sampler = MCMC(kernel, num_samples, warmup_steps=warmup_steps, disable_progbar=not progress)
                sampler.run()
            chains.append({k: v.detach().cpu() for k, v in sampler.get_samples().items()})
            divergences += len(sampler.diagnostics().get("divergences", {}).get("chain 0", []))
    points = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    latents = [value.reshape(num_chains, num_samples, -1).double() for value in points.values()]
    drawn = torch.cat(latents, dim=-1).numpy()
    found = {"r_hat": _worst(array_stats.rhat, drawn, np.nanmax), "ess": _worst(array_stats.ess, drawn, np.nanmin)}
    if divergences:
        logger.warning("%d of %d transitions diverged: raise target_accept", divergences, num_chains * num_samples)
    return replace(
        posterior,
        guide=EmpiricalGuide(points, num_chains=num_chains),
        provenance={
            **posterior.provenance,
            "method": "NUTS",
            "num_steps": num_samples,
            **found,
            "divergences": divergences,
        },
    )


class _FullData:
    """log p(s) + log p(y | s) as a Pyro program without plates."""

    def __init__(self, prior: Prior, likelihood: LogLikelihood) -> None:
        self.prior = prior
        self.likelihood = likelihood

    def __call__(self) -> None:
        s = self.prior()
        pyro.factor("log_likelihood", self.likelihood(s))


def _means(posterior: Posterior) -> dict[str, Tensor]:
    with torch.no_grad(), local_params():
        return posterior.guide.mean()


def _check_continuous(prior: Prior) -> None:
    for name, site in prior_sites(prior).items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"The site {name!r} of the prior {prior} is discrete, but NUTS follows gradients: use a posterior with "
                "a continuous prior, or judge this one by diagnose()."
            )


def _jittered(prior: Prior, name: str, value: Tensor, jitter: float) -> Tensor:
    """A start near ``value``; positive sites stay positive."""
    support = prior_sites(prior)[name]["fn"].support
    noise = jitter * torch.randn_like(value)
    return value + noise if bool(support.check(-torch.ones_like(value)).all()) else value * noise.exp()


def _worst(statistic: Any, drawn: np.ndarray, pick: Any) -> float:
    """The worst value over the latents; NaN where one chain cannot tell."""
    values = [statistic(drawn[..., d]) for d in range(drawn.shape[-1])]
    return float(pick(values)) if np.isfinite(values).any() else float("nan")
