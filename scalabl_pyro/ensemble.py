"""Restarts of the guide with A and B held fixed, and the mixture of their outcomes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .guides import Guide, GuideLike, MixtureGuide, as_guide
from .model import BayesianLoRA
from .posterior import Posterior
from .refit import refit


def ensemble(
    posterior: Posterior,
    data: Any,
    *,
    num_members: int = 3,
    guide: GuideLike = "normal",
    spread: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Posterior:
    """Fit a guide several times from different starts, and mix the outcomes with equal weights.

    Factors, heads and the task's parameters are those of ``posterior`` and stay fixed, so that the members describe the
    same latents: their disagreement says whether one run can be trusted (``diagnose``), and their mixture covers modes
    that one of them misses.

    Args:
        posterior: gives the factors, and the middle of the starts.
        data: the training rows.
        num_members: number of fits.
        guide: posterior family of each member, see :func:`scalabl_pyro.guides.as_guide`.
        spread: standard deviation of the starts around the posterior mean.
        seed: of the first member; the others count on from it.
        options: of :func:`scalabl_pyro.fit` (steps, learning rates, ...); in ``checkpoint_dir`` each member gets a
            folder of its own.

    Returns:
        A posterior whose guide is a :class:`~scalabl_pyro.guides.MixtureGuide`.
    """
    if num_members < 2:
        raise ValueError(f"num_members={num_members}: an ensemble has 2 or more.")
    members, folder = [], options.get("checkpoint_dir")
    for own_seed in range(seed, seed + num_members):

        def start(blora: BayesianLoRA, own_seed: int = own_seed) -> Guide:
            family = as_guide(guide, blora, init_scale=options.get("init_scale", 0.05), seed=own_seed)
            return _moved(family, spread, own_seed)

        own = options if folder is None else {**options, "checkpoint_dir": Path(folder) / f"seed-{own_seed}"}
        members.append(refit(posterior, data, guide=start, seed=own_seed, **own).posterior.guide)
    return replace(posterior, guide=MixtureGuide(members), provenance={**posterior.provenance, "members": num_members})


def _moved(guide: Guide, spread: float, seed: int) -> Guide:
    """The guide, starting elsewhere."""
    loc = getattr(guide, "loc", None)
    if not isinstance(loc, nn.Parameter):
        raise TypeError(
            f"{type(guide).__name__} has no parameter 'loc' to start elsewhere: use 'normal', 'layer_covariance', "
            "'lowrank', 'full_covariance', 'flow' or 'delta'."
        )
    noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
    with torch.no_grad():
        loc.add_(spread * noise.to(loc.device))
    return guide
