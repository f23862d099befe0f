"""Restarts of the guide with A and B held fixed, mixed into one posterior."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .._arguments import check_path, check_role
from .._errors import check_count, check_not_negative
from .._process.random_state import as_seed, derive_seed
from ..guides import INIT_SCALE, Guide, GuideLike, MixtureGuide, as_guide
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
    """Fit a guide several times from different initial values, and mix the results with equal weights.

    Factors, heads and task parameters are those of ``posterior`` and stay fixed. All members have the same prior, so
    they approximate the same posterior. Their disagreement tells whether one run can be trusted
    (:meth:`scalabl_pyro.Posterior.diagnose`); their mixture covers modes that one of them misses.

    Args:
        posterior: Posterior that gives the factors, and the center of the initial values.
        data: Training rows.
        num_members: Number of fits, 2 or more.
        guide: Family of the approximate posterior q(s) of each member, see :func:`scalabl_pyro.guides.as_guide`.
        prior: New prior, see :func:`scalabl_pyro.bayesian_lora`; by default the posterior's own. Parameters of the
            prior are learned with the first member.
        spread: Standard deviation of the initial values around the posterior mean.
        seed: Seed of the first member; each later member takes the next integer.
        options: Options of :func:`scalabl_pyro.fit` (steps, learning rates, ...). With ``checkpoint_dir``, each member
            gets its own folder inside it.

    Returns:
        A posterior whose guide is a :class:`~scalabl_pyro.guides.MixtureGuide`.

    Raises:
        ValueError: Fewer than two members, or a negative spread.
        KeyboardInterrupt: Ctrl-C ended a member. With ``checkpoint_dir``, the same call goes on from there.
        TypeError: The family has no location that could start elsewhere.

    Example:
        >>> restarts = scalabl_pyro.ensemble(posterior, train_data, num_members=2, num_steps=3, progress=False)
        >>> len(restarts.guide)
        2

    References:
        Lakshminarayanan et al., Deep ensembles, NeurIPS 2017, with a posterior in the place of each point.
    """
    check_role("posterior", posterior, "posterior", call="ensemble(posterior, data)")
    check_count(num_members=num_members, least=2)
    check_not_negative(spread=spread)
    seed = as_seed(seed)
    members: list[Posterior] = []
    folder = options.get("checkpoint_dir")
    if folder is not None:
        check_path("checkpoint_dir", folder)
    for number, member_seed in enumerate(range(seed, seed + num_members)):

        def build(blora: BayesianLoRA, member_seed: int = member_seed) -> Guide:
            scale_seed = derive_seed(member_seed, "initial scales")
            family = as_guide(guide, blora, init_scale=options.get("init_scale", INIT_SCALE), seed=scale_seed)
            if family is guide:  # members must not share one guide
                family = copy.deepcopy(family)
            return _moved(family, spread, member_seed)

        member_prior = members[0].prior if members else prior
        own = options if folder is None else {**options, "checkpoint_dir": Path(folder) / f"seed-{member_seed}"}
        result = refit(posterior, data, guide=build, prior=member_prior, seed=member_seed, **own)
        members.append(result.complete(f"member {number} of {num_members}").posterior)
    return replace(
        posterior,
        guide=MixtureGuide([member.guide for member in members]),
        prior=members[0].prior,
        provenance={**members[0].provenance, "members": len(members)},
    )


def _moved(guide: Guide, spread: float, seed: int) -> Guide:
    """The guide, with noise added to its location."""
    loc = guide.location()
    if loc is None:
        raise TypeError(
            f"{type(guide).__name__} has no parameter 'loc' that could start elsewhere: use 'normal', "
            "'layer_covariance', 'lowrank', 'full_covariance', 'flow' or 'delta'."
        )
    noise = torch.randn(
        loc.shape, generator=torch.Generator().manual_seed(derive_seed(seed, "initial locations")), dtype=loc.dtype
    )
    with torch.no_grad():
        loc.add_(spread * noise.to(loc.device))
    return guide
