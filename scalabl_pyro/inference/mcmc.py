"""The reference posterior: NUTS on the latents with A and B held fixed, on the whole data set."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from .._arguments import check_role, known_arguments
from .._errors import check_count, check_flag, check_not_negative, is_number
from .._process.memory import check_memory
from .._process.pyro_errors import without_trace_shapes
from .._process.pyro_modes import local_params
from .._process.random_state import as_seed, scoped_seed
from ..data.batch import Batch
from ..data.encoding import encode
from ..data.rows import rows_for
from ..guides import EmpiricalGuide
from ..model.log_likelihood import LogLikelihood
from ..posterior.posterior import Posterior
from ..prediction.room import COPIES, size_of
from ..priors import Prior
from ..priors.sites import check_transforms, prior_sites
from ..priors.supports import to_support
from .recording_nuts import RecordingNUTS

logger = logging.getLogger(__name__)

#: Shorter warm-ups adapt the step size alone. Pyro estimates the mass matrix in the middle of the warm-up and then
#: restarts the step size. A short warm-up would give a poor mass matrix, and a step size hardly adapted to it.
MIN_MASS_WARMUP = 50
#: R-hat needs this many draws per chain.
MIN_SAMPLES = 4


@known_arguments
@without_trace_shapes()
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
    """Sample p(s | data, A, B) by Pyro's no-U-turn sampler, for small models and data.

    Every guide can be compared with it: it has the factors, prior and likelihood of ``posterior``, and assumes no
    family. Each gradient is a pass over all of ``data``. The cost is about
    num_chains * (num_samples + warmup_steps) * 10 to 100 such passes.

    Args:
        posterior: Posterior that gives factors, prior, task, and the center of the initial values.
        data: All training rows. The sampler is not valid on a minibatch.
        num_samples: Number of draws to keep per chain, 4 or more.
        warmup_steps: Number of steps that adapt the step size and, from 50 steps on, the mass matrix. Their draws are
            not kept.
        num_chains: Number of chains, which run one after the other.
        batch_size: Rows per forward pass. It limits the memory of a pass; the hidden states below the first adapted
            block are kept for all rows.
        jitter: Standard deviation of the initial values around the posterior mean.
        max_tree_depth: Largest tree depth; a step takes up to 2^max_tree_depth gradients.
        target_accept: Acceptance probability that the step size adapts to.
        seed: Seed of initial values and draws. The global random state stays as it is.
        progress: Whether to show Pyro's progress bar.

    Returns:
        A posterior whose draws are those of the chains. Its provenance holds the largest ``r_hat``, the smallest
        ``ess`` and the number of ``divergences``. ``to_arviz()`` keeps the chains apart, and exports energy, acceptance
        rate, step size, tree depth and divergence of each draw as ``sample_stats``.

    Raises:
        ValueError: ``data`` yields batches instead of rows, the prior has a site that is discrete or has an unknown
            support, or an option is outside its range.

    Example:
        >>> chains = scalabl_pyro.mcmc(
        ...     posterior, train_data, num_samples=4, warmup_steps=2, max_tree_depth=2, progress=False
        ... )
        >>> len(chains.guide)  # 2 chains of 4 draws
        8

    References:
        Hoffman and Gelman, The No-U-Turn Sampler, JMLR 2014.
    """
    check_role("posterior", posterior, "posterior", call="mcmc(posterior, data)")
    check_count(num_samples=num_samples, least=MIN_SAMPLES)
    check_count(warmup_steps=warmup_steps, num_chains=num_chains, batch_size=batch_size, max_tree_depth=max_tree_depth)
    if not is_number(target_accept) or not 0 < target_accept < 1:
        raise ValueError(f"target_accept={target_accept!r} must lie between 0 and 1: it is a probability.")
    check_not_negative(jitter=jitter)
    seed = as_seed(seed)
    check_flag(progress=progress)
    _check_continuous(posterior.prior)
    program = _FullData(posterior.prior, _full_likelihood(posterior, data, batch_size))
    start = {name: value.detach() for name, value in _means(posterior).items()}
    kept = num_chains * num_samples * COPIES * size_of(start)
    check_memory(f"{num_chains:,} chains of {num_samples:,} draws", kept, "Ask for fewer draws or chains.")
    chains: list[dict[str, Tensor]] = []
    statistics: list[dict[str, Tensor]] = []
    with local_params(), torch.enable_grad():
        for chain in range(num_chains):
            with scoped_seed(seed + chain):
                jittered = {name: _jittered(posterior.prior, name, value, jitter) for name, value in start.items()}
                kernel = RecordingNUTS(
                    program,
                    init_strategy=init_to_value(values=jittered),
                    max_tree_depth=max_tree_depth,
                    adapt_mass_matrix=warmup_steps >= MIN_MASS_WARMUP,
                    target_accept_prob=target_accept,
                )
                sampler = MCMC(kernel, num_samples, warmup_steps=warmup_steps, disable_progbar=not progress)
                sampler.run()
            chains.append({k: v.detach().cpu() for k, v in sampler.get_samples().items()})
            statistics.append(kernel.statistics())
    divergences = int(sum(chain["diverging"].sum().item() for chain in statistics))
    if divergences:
        logger.warning("%d of %d transitions diverged: raise target_accept", divergences, num_chains * num_samples)
    return replace(
        posterior,
        guide=EmpiricalGuide(_joined(chains), num_chains=num_chains, statistics=_joined(statistics)),
        provenance={
            **posterior.provenance,
            "method": "NUTS",
            "num_steps": int(num_samples),
            **_worst_r_hat_and_ess(chains),
            "divergences": divergences,
        },
    )


def _full_likelihood(posterior: Posterior, data: Any, batch_size: int) -> LogLikelihood:
    """The log likelihood of the whole data set as a function of s."""
    rows = rows_for(posterior.task.encode, data)
    if isinstance(rows[0], Batch):
        raise ValueError("data yields batches, but NUTS needs the density of the whole data set: pass its rows.")
    examples = encode(rows, posterior.task.encode, need_target=True)
    return LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size, cache_prefix=True)


class _FullData:
    """log p(s) + log p(y | s) as a Pyro program without plates."""

    def __init__(self, prior: Prior, likelihood: LogLikelihood) -> None:
        self.prior = prior
        self.likelihood = likelihood

    def __call__(self) -> None:
        s = self.prior()
        pyro.factor("log_likelihood", self.likelihood(s))


def _joined(chains: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}


def _means(posterior: Posterior) -> dict[str, Tensor]:
    with torch.no_grad(), local_params():
        return posterior.guide.mean()


def _check_continuous(prior: Prior) -> None:
    sites = prior_sites(prior)
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"The site {name!r} of the prior {prior} is discrete, but NUTS follows gradients: use a posterior with "
                "a continuous prior, or check this one by diagnose()."
            )
    check_transforms("NUTS", sites)


def _jittered(prior: Prior, name: str, value: Tensor, jitter: float) -> Tensor:
    """An initial value near ``value``, inside the support of the site."""
    transform = to_support(prior_sites(prior)[name]["fn"])
    free = transform.inv(value)
    return transform(free + jitter * torch.randn_like(free))


def _worst_r_hat_and_ess(chains: list[dict[str, Tensor]]) -> dict[str, float]:
    """The largest R-hat and the smallest effective sample size over all latents."""
    from arviz_stats.base import array_stats

    sites = [torch.stack([chain[name] for chain in chains]) for name in chains[0]]  # each (chains, draws, ...)
    draws = torch.cat([site.reshape(*site.shape[:2], -1).double() for site in sites], dim=-1).numpy()
    return {"r_hat": _worst(array_stats.rhat, draws, np.nanmax), "ess": _worst(array_stats.ess, draws, np.nanmin)}


def _worst(statistic: Any, draws: np.ndarray, pick: Any) -> float:
    """The worst value over the latents; NaN where one chain cannot tell."""
    values = [statistic(draws[..., d]) for d in range(draws.shape[-1])]
    return float(pick(values)) if np.isfinite(values).any() else float("nan")
