"""Builds the loss module of a training whose loop is not ours."""

import logging

from pyro.infer import ELBO

from ..._process.random_state import derive_seed
from ...guides import GuideLike, as_guide
from ...lora.base_module import check_has_values
from ...model.bayesian_lora import BayesianLoRA
from ...tasks import Task
from ...training.fresh_start import choose_start
from ...training.options import DrawsPerBatch
from ...training.start_check import check_finite
from .elbo_module import ElboModule
from .refusals import check_placement

logger = logging.getLogger(__name__)


def check_llm(blora: BayesianLoRA) -> None:
    """Check that the LLM can be trained by a loop that is not ours.

    Raises:
        ValueError: It has no values, lies on several devices, or another wrapper holds it now.
    """
    blora.adapter.check_attached()
    check_has_values(blora.llm)
    check_placement(blora.llm)


def start_elbo(
    blora: BayesianLoRA,
    task: Task,
    guide: GuideLike,
    *,
    elbo: ELBO | None,
    draws: DrawsPerBatch,
    init_scale: float,
    factor_scale: float | None,
    seed: int,
) -> tuple[ElboModule, str]:
    """Build the loss module. A warning tells if an earlier training has changed the LLM.

    Args:
        blora: The LLM.
        task: The likelihood.
        guide: Family of the approximate posterior, as for :func:`scalabl_pyro.fit`.
        elbo: Estimator, or None for the default one.
        draws: ``"per_example"`` or ``"shared"``.
        init_scale: Largest initial standard deviation of the guide.
        factor_scale: Standard deviation of a prior on the factors, or None.
        seed: Seed of the initial scales and of the noise.

    Returns:
        The module, and ``"fresh"`` or ``"continued"``.

    Raises:
        ValueError: A parameter is not finite, or the guide does not fit the prior.
    """
    moved = choose_start(blora, task, reset=False)
    if moved:
        logger.warning(
            "an earlier training changed %s, and this one goes on from there; wrap the LLM again to start afresh",
            " and ".join(moved),
        )
    check_finite(point_estimates=blora.point_estimates, prior=blora.prior, task=task)
    family = as_guide(guide, blora, init_scale=init_scale, seed=derive_seed(seed, "initial scales"))
    module = ElboModule(
        blora,
        task.to(blora.device),
        family.to(blora.device),
        elbo=elbo,
        draws=draws,
        factor_scale=factor_scale,
        seed=derive_seed(seed, "noise"),
    )
    return module, "continued" if moved else "fresh"
