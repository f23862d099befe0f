"""Inference of s with another guide or prior, with the factors of a fitted posterior held fixed: p(s | y, A, B)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._arguments import check_role
from ..guides import GuideLike
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..priors import PriorLike, as_prior
from ..training.fit import fit
from ..training.result import FitResult


def refit(
    posterior: Posterior,
    data: Any,
    *,
    guide: GuideLike = "normal",
    prior: PriorLike | None = None,
    seed: int = 0,
    **options: Any,
) -> FitResult:
    """Infer s again by SVI, with the factors, heads and task parameters of ``posterior``.

    Guides that were fitted with their own factors approximate posteriors of different models. After ``refit`` with the
    same factors, they approximate the same posterior. Then they can be compared with each other and with
    :func:`scalabl_pyro.mcmc`.

    Args:
        posterior: Posterior that gives all that stays fixed, and the initial mean of s.
        data: Training rows.
        guide: Family of the approximate posterior q(s), see :func:`scalabl_pyro.guides.as_guide`.
        prior: New prior, see :func:`scalabl_pyro.bayesian_lora`; by default the posterior's own.
        seed: Seed of initial scales, batches and noise.
        options: Options of :func:`scalabl_pyro.fit` (steps, learning rates, ...).

    Returns:
        Posterior and history, as from :func:`scalabl_pyro.fit`. ``posterior`` itself stays unchanged.

    Raises:
        ValueError: An option of ``fit`` is wrong, see :func:`scalabl_pyro.fit`.

    Example:
        >>> wider = scalabl_pyro.refit(posterior, train_data, prior=2.0, num_steps=3, progress=False)
        >>> wider.posterior.factors[0][0].equal(posterior.factors[0][0])
        True
    """
    check_role("posterior", posterior, "posterior", call="refit(posterior, data)")
    with frozen_factors(posterior) as blora:
        if prior is not None:
            own = copy.deepcopy(as_prior(prior, blora.subspace))  # training must not change the caller's prior
            blora = BayesianLoRA(posterior.adapter, prior=own)
        return fit(blora, posterior.task, data, guide=guide, seed=seed, **options)


@contextmanager
def frozen_factors(posterior: Posterior) -> Iterator[BayesianLoRA]:
    """Give the LLM the posterior's factors and heads, frozen; restore its own factors and heads on exit."""
    adapter = posterior.adapter
    loc = posterior.mean().to(adapter.loc)
    with adapter.resting_at(loc, factors=posterior.factors, heads=posterior.heads):
        yield posterior.blora()
