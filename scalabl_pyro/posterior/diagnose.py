"""Diagnosis of a posterior: computes draws, densities and two predictions, and passes them to each check."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from ..analysis.checks import (
    Diagnosis,
    against_posterior,
    as_diagnosis,
    check_chains,
    check_drift,
    check_history,
    check_scales,
    check_usefulness,
)
from ..analysis.finding import Finding
from ..analysis.psis import LogWeights, check_num_draws
from ..data.encoding import encode
from ..data.rows import Row
from ..metrics import Array
from ..prediction.draws import sample_prior
from ..prediction.predict import predict
from .state import PosteriorState, check_room_for_densities, densities_of

#: Number of draws behind widths and means; these need no forward pass.
MANY_DRAWS = 1000
#: Number of draws of the prediction that is scored, and compared with the prediction at the mean.
PREDICTION_DRAWS = 50


def diagnose(
    posterior: PosteriorState,
    rows: Sequence[Row],
    *,
    history: pd.DataFrame | None,
    num_draws: int,
    num_data: int | None,
    seed: int,
    batch_size: int,
) -> Diagnosis:
    """Run all checks that apply to a posterior; see :meth:`scalabl_pyro.Posterior.diagnose`."""
    check_num_draws("diagnose()", num_draws)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    check_room_for_densities(posterior, len(rows), num_draws)
    draws = posterior.sample(max(num_draws, MANY_DRAWS), seed=seed)
    s = draws.s
    # The same seed on purpose: common random numbers make the ratio of the widths less noisy.
    prior_s = sample_prior(posterior.prior, len(s), seed=seed)
    findings = [*check_history(history), *check_scales(s.numpy(), prior_s.numpy(), posterior.subspace)]
    if not torch.isfinite(s).all():  # this is a finding by now, and no other check can run
        return as_diagnosis(findings)
    weights = densities_of(posterior, draws.first(num_draws), rows, num_data=num_data, batch_size=batch_size)
    findings += _compare_with_posterior(posterior, weights, s[:num_draws].numpy(), seed=seed)
    if posterior.task.scores_only:
        return as_diagnosis(findings)
    # Shifted to the mean of many draws, the first draws lose the first-order part of their Monte Carlo error.
    centered = s[:PREDICTION_DRAWS] - s[:PREDICTION_DRAWS].mean(0) + s.mean(0)
    examples = encode(rows, posterior.task.encode, need_target=True)
    llm, mean = posterior.llm(), posterior.mean().unsqueeze(0)
    at_mean, over_draws = (predict(llm, posterior.task, part, examples, **options) for part in (mean, centered))
    return as_diagnosis([*findings, *check_drift(at_mean, over_draws), *check_usefulness(over_draws)])


def _compare_with_posterior(posterior: PosteriorState, weights: LogWeights, s: Array, *, seed: int) -> list[Finding]:
    """Compare q with the posterior, in the way that its family allows: by densities, by chains, or by restarts."""
    findings: list[Finding] = []
    if weights.log_q is not None:
        findings += against_posterior(weights.log_joint, weights.log_q, s, posterior.subspace.labels())
    if (chains := posterior.guide.chains()) is not None:
        findings += check_chains(chains["s"].double().numpy(), "chain")
    elif components := posterior.guide.component_list():
        # The same seed on purpose: R-hat then shows differences of the restarts, not of their random numbers.
        members = [component.sample(len(s), seed=seed)["s"] for component in components]
        findings += check_chains(torch.stack(members).double().numpy(), "restart")
    if not findings:
        cause = "draws of this family have no density, so nothing here measures their distance from the posterior."
        advice = "Compare predictions with those of a guide that has a density, by refit(), or of mcmc()."
        findings = [Finding("density", "note", float("nan"), float("nan"), cause, advice)]
    return findings
