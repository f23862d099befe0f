"""Restarts of the guide with A and B held fixed, and the mixture of their outcomes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..guides import INIT_SCALE, Guide, GuideLike, MeanFieldGuide, MixtureGuide, WithHyperparameters, as_guide
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..priors import PriorLike
from .refit import refit


def ensemble(
    posterior: Posterior,
    data: Any,
    *,
    num_members: int = 3,
    guide: GuideLike = "normal",
    prior: PriorLike | None = None,
    spread: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Posterior:
    """Fit a guide several times from different starts, and mix the outcomes with equal weights.

    Factors, heads and the task's parameters are those of ``posterior`` and stay fixed, and all members have one prior,
    so that they approximate the same posterior: their disagreement says whether one run can be trusted (``diagnose``),
    and their mixture covers modes that one of them misses.

    Args:
        posterior: gives the factors, and the middle of the starts.
        data: the training rows.
        num_members: number of fits.
        guide: posterior family of each member, see :func:`scalabl_pyro.guides.as_guide`.
        prior: another prior, see :func:`scalabl_pyro.bayesian_lora`; default: the posterior's own. What it learns, it
            learns with the first member.
        spread: standard deviation of the starts around the posterior mean.
        seed: of the first member; the others count on from it.
        options: of :func:`scalabl_pyro.fit` (steps, learning rates, ...); in ``checkpoint_dir`` each member gets a
            folder of its own.

    Returns:
        A posterior whose guide is a :class:`~scalabl_pyro.guides.MixtureGuide`.

    Raises:
        ValueError: fewer than two members.
        TypeError: a family without a location to start elsewhere.

    References:
        Lakshminarayanan et al., Deep Ensembles, NeurIPS 2017, with a posterior in the place of each point.
    """
    if num_members < 2:
        raise ValueError(f"num_members={num_members}: an ensemble has 2 or more.")
    members: list[Posterior] = []
    folder = options.get("checkpoint_dir")
    for own_seed in range(seed, seed + num_members):

        def start(blora: BayesianLoRA, own_seed: int = own_seed) -> Guide:
            family = as_guide(guide, blora, init_scale=options.get("init_scale", INIT_SCALE), seed=own_seed)
            if family is guide:  # each member is a guide of its own
                family = copy.deepcopy(family)
            return _moved(family, spread, own_seed)

        own_prior = members[0].prior if members else prior
        own = options if folder is None else {**options, "checkpoint_dir": Path(folder) / f"seed-{own_seed}"}
        members.append(refit(posterior, data, guide=start, prior=own_prior, seed=own_seed, **own).posterior)
    return replace(
        posterior,
        guide=MixtureGuide([member.guide for member in members]),
        prior=members[0].prior,
        provenance={**members[0].provenance, "members": num_members},
    )


def _moved(guide: Guide, spread: float, seed: int) -> Guide:
    """The guide, starting elsewhere."""
    loc = _location(guide)
    if loc is None:
        raise TypeError(
            f"{type(guide).__name__} has no parameter 'loc' to start elsewhere: use 'normal', 'layer_covariance', "
            "'lowrank', 'full_covariance', 'flow' or 'delta'."
        )
    noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
    with torch.no_grad():
        loc.add_(spread * noise.to(loc.device))
    return guide


def _location(guide: Guide) -> nn.Parameter | None:
    """The parameter of a guide that says where s lies, on the real line, if there is one."""
    if isinstance(guide, WithHyperparameters):
        return _location(guide.of_s)
    found = getattr(guide, "loc_s" if isinstance(guide, MeanFieldGuide) else "loc", None)
    return found if isinstance(found, nn.Parameter) else None
