"""Restarts of the guide with A and B held fixed, and the mixture of their outcomes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .fit import fit
from .guides import Guide, GuideLike, MixtureGuide, as_guide
from .model import BayesianLoRA
from .posterior import Posterior


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
        options: of :func:`scalabl_pyro.fit` (steps, learning rates, ...).

    Returns:
        A posterior whose guide is a :class:`~scalabl_pyro.guides.MixtureGuide`.
    """
    if num_members < 2:
        raise ValueError(f"num_members={num_members}: an ensemble has 2 or more.")
    members = []
    for member in range(num_members):
        with _held(posterior) as blora:
            start = as_guide(guide, blora, init_scale=options.get("init_scale", 0.05), seed=seed + member)
            _move(start, spread, seed + member)
            members.append(fit(blora, posterior.task, data, guide=start, seed=seed + member, **options).posterior.guide)
    return replace(posterior, guide=MixtureGuide(members), provenance={**posterior.provenance, "members": num_members})


@contextmanager
def _held(posterior: Posterior) -> Iterator[BayesianLoRA]:
    """The LLM with the posterior's factors and heads in place and frozen; as before afterwards."""
    adapter = posterior.adapter
    blora = posterior.blora()
    live = list(blora.point_estimates.parameters())
    before = [(p, p.detach().clone(), p.requires_grad) for p in live]
    loc = adapter.loc
    try:
        with torch.no_grad():
            for pair, saved in zip(adapter.factors(), posterior.factors, strict=True):
                for factor, value in zip(pair, saved, strict=True):
                    factor.copy_(value)
            for name, head in posterior.heads.items():
                adapter.heads[name].load_state_dict(head.state_dict())
        for p in live:
            p.requires_grad_(False)
        yield blora
    finally:
        adapter.loc = loc
        with torch.no_grad():
            for p, value, flag in before:
                p.copy_(value)
                p.requires_grad_(flag)


def _move(guide: Guide, spread: float, seed: int) -> None:
    """Shift where a guide starts."""
    loc = getattr(guide, "loc", None)
    if not isinstance(loc, nn.Parameter):
        raise TypeError(
            f"{type(guide).__name__} has no parameter 'loc' to start elsewhere: use 'normal', 'layer_covariance', "
            "'lowrank', 'full_covariance', 'flow' or 'delta'."
        )
    noise = torch.randn(loc.shape, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
    with torch.no_grad():
        loc.add_(spread * noise.to(loc.device))
