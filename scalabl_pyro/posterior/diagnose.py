"""Diagnosis of a posterior: computes draws, densities and two predictions, and passes them to each check."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from ..analysis.checks import (
    Diagnosis,
    as_diagnosis,
    check_chains,
    check_drift,
    check_history,
    check_scales,
    check_weights,
)
from ..analysis.psis import check_num_draws
from ..data.encoding import encode
from ..data.rows import Row
from ..prediction.draws import sample_prior
from ..prediction.predict import predict
from .state import PosteriorState

#: Number of draws behind widths and means; these need no forward pass.
MANY_DRAWS = 1000
#: Number of rows and draws of the prediction that is compared with the prediction at the mean.
DRIFT_ROWS = DRIFT_DRAWS = 50


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
    guide = posterior.guide
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    s = posterior.sample(max(num_draws, MANY_DRAWS), seed=seed).s
    # The same seed on purpose: common random numbers make the ratio of the widths less noisy.
    prior_s = sample_prior(posterior.prior, len(s), seed=seed)
    findings = [*check_history(history), *check_scales(s.numpy(), prior_s.numpy(), posterior.subspace)]
    if not torch.isfinite(s).all():  # this is a finding by now, and no other check can run
        return as_diagnosis(findings)
    weights = posterior.log_weights(rows, num_draws=num_draws, num_data=num_data, **options)
    if weights.log_q is not None:
        findings += check_weights(weights.log_weights)
    if (chains := guide.chains()) is not None:
        findings += check_chains(chains["s"].double().numpy(), "chain")
    elif components := guide.component_list():
        # The same seed on purpose: R-hat then shows differences of the restarts, not of their random numbers.
        members = [component.sample(num_draws, seed=seed)["s"] for component in components]
        findings += check_chains(torch.stack(members).double().numpy(), "restart")
    # Shifted to the mean of many draws, the first draws lose the first-order part of their Monte Carlo error.
    centered = s[:DRIFT_DRAWS] - s[:DRIFT_DRAWS].mean(0) + s.mean(0)
    examples = encode(rows[:DRIFT_ROWS], posterior.task.encode, need_target=False)
    llm, mean = posterior.llm(), posterior.mean().unsqueeze(0)
    at_mean, over_draws = (predict(llm, posterior.task, part, examples, **options) for part in (mean, centered))
    return as_diagnosis([*findings, *check_drift(at_mean, over_draws)])
