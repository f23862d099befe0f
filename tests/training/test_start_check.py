"""A parameter from which no update can be made is named before the first step, and nothing was changed."""

import math

import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer.autoguide import AutoNormal

import scalabl_pyro as sp

ROWS = tiny.question_rows(8)
LORA = {"r": 2, "target_modules": ["q_proj"]}


def fit(blora, task=None, **options):
    options = {"num_steps": 2, "batch_size": 4, "progress": False, **options}
    return sp.fit(blora, task or sp.MultipleChoice(tiny.tokenizer()), ROWS, **options)


def set_one(parameter, value):
    with torch.no_grad():
        parameter.view(-1)[0] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_factor_that_is_not_finite_is_named(factor, value):
    blora = sp.bayesian_lora(tiny.causal_lm(), **LORA)
    parameter = next(p for name, p in blora.point_estimates.named_parameters() if name.endswith(factor))
    set_one(parameter, value)
    with pytest.raises(
        ValueError, match=rf"^Before the first step, .*/{factor} is NaN or infinite in 1 of .*reset=True"
    ):
        fit(blora)
    start = [p.detach().clone() for p in blora.point_estimates.parameters()]
    with pytest.raises(ValueError, match="Before the first step"):  # whatever the policy: no step was taken
        fit(blora, on_nonfinite="skip")
    for before, after in zip(start, blora.point_estimates.parameters(), strict=True):
        assert torch.equal(before, after) or not before.isfinite().all()
    assert len(fit(blora, reset=True).history) == 2


def test_a_parameter_of_the_prior_that_is_not_finite_is_named():
    blora = sp.bayesian_lora(tiny.causal_lm(), prior="empirical", **LORA)
    set_one(next(p for p in blora.prior.parameters() if p.requires_grad), math.nan)
    with pytest.raises(ValueError, match=r"Before the first step, scale of the prior is NaN or infinite in 1 of"):
        fit(blora)


def test_a_scale_of_the_guide_that_is_infinite_as_an_exponential_is_named():
    def guide(blora):
        family = sp.guides.as_guide("normal", blora)
        set_one(next(p for name, p in family.named_parameters() if "scale" in name), 500.0)  # a logarithm
        return family

    blora = sp.bayesian_lora(tiny.causal_lm(), **LORA)
    with pytest.raises(ValueError, match="a scale of the guide has numbers up to 500, too large to be squared"):
        fit(blora, guide=guide)


def test_an_auto_guide_that_starts_at_nan_is_refused_or_named():
    blora = sp.bayesian_lora(tiny.causal_lm(), prior=dist.Normal(0.0, 1.0), **LORA)

    def guide(given):
        family = sp.guides.as_guide(AutoNormal, given)
        set_one(next(p for name, p in family.named_parameters() if "loc" in name), math.nan)
        return family

    with pytest.raises(ValueError, match=r"Before the first step, auto.locs.s of the guide is NaN or infinite in 1 of"):
        fit(blora, guide=guide)


def test_a_large_number_that_an_update_would_keep_is_trained():
    blora = sp.bayesian_lora(tiny.causal_lm(), **LORA)
    set_one(next(p for name, p in blora.point_estimates.named_parameters() if name.endswith("B")), 100.0)
    assert len(fit(blora).history) == 2
