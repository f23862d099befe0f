"""Another guide or prior with the factors of a fitted posterior held fixed: p(s | y, A, B) inferred anew."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    Guides that were fitted with their own factors approximate posteriors of different models. Refitted, they
    approximate one and the same, so that they can be held against each other and against :func:`scalabl_pyro.mcmc`.

    Args:
        posterior: gives all that stays fixed, and where the mean of s starts.
        data: the training rows.
        guide: posterior family, see :func:`scalabl_pyro.guides.as_guide`.
        prior: another prior, see :func:`scalabl_pyro.bayesian_lora`; default: the posterior's own.
        seed: of initial scales, batches and noise.
        options: of :func:`scalabl_pyro.fit` (steps, learning rates, ...).

    Returns:
        As :func:`scalabl_pyro.fit`; ``posterior`` itself stays as it is.
    """
    with held(posterior) as blora:
        if prior is not None:
            own = copy.deepcopy(as_prior(prior, blora.subspace))  # what it learns is not the caller's
            blora.prior = own.to(blora.device, blora.adapter.loc.dtype)
        return fit(blora, posterior.task, data, guide=guide, seed=seed, **options)


@contextmanager
def held(posterior: Posterior) -> Iterator[BayesianLoRA]:
    """The LLM with the posterior's factors and heads in place and frozen; as before afterwards."""
    adapter = posterior.adapter
    loc = posterior.mean().to(adapter.loc)
    with adapter.resting_at(loc, factors=posterior.factors, heads=posterior.heads):
        yield posterior.blora()
