"""A scale, a distribution, one per layer, or a program: each becomes the same kind of Pyro program over s."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro import poutine
from torch import nn
from torch.distributions import kl_divergence

import scalabl_pyro as sp
from scalabl_pyro.lora.subspace import Layer, Subspace
from scalabl_pyro.priors import FixedPrior, Prior, as_prior

SUBSPACE = Subspace((Layer("low.q_proj", 2, 7, 6), Layer("high.v_proj", 3, 7, 6)))
D = 5
VECTOR = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5])


def log_prob(prior, s):
    """Log density of the site s in a trace."""
    with poutine.trace() as tracer, poutine.condition(data={"s": s}):
        prior()
    node = tracer.trace.nodes["s"]
    return node["fn"].log_prob(node["value"])


VALID = {
    "scale": (2.0, dist.Normal(0.0, 2.0)),
    "whole scale": (2, dist.Normal(0.0, 2.0)),
    "scalar distribution": (dist.Laplace(0.5, 2.0), dist.Laplace(0.5, 2.0)),
    "three parameters": (dist.StudentT(3.0, 0.5, 2.0), dist.StudentT(3.0, 0.5, 2.0)),
    "distribution of torch": (torch.distributions.Normal(0.0, 2.0), dist.Normal(0.0, 2.0)),
    "positive support": (dist.HalfNormal(2.0), dist.HalfNormal(2.0)),
    "a transform inside": (dist.LogNormal(0.5, 2.0), dist.LogNormal(0.5, 2.0)),
    "batch of one": (dist.Normal(torch.zeros(1), 2.0), dist.Normal(0.0, 2.0)),
    "batch of D": (dist.Normal(VECTOR, 2.0), dist.Normal(VECTOR, 2.0)),
    "event of D": (dist.Normal(0.0, VECTOR).to_event(1), dist.Normal(0.0, VECTOR)),
    "expanded": (dist.Normal(0.0, 2.0).expand([D]).to_event(1), dist.Normal(0.0, 2.0)),
    "one number per layer": (
        lambda layer: dist.Normal(0.0, float(layer.rank)),
        dist.Normal(0.0, torch.tensor([2.0, 2.0, 3.0, 3.0, 3.0])),
    ),
    "r numbers per layer": (
        lambda layer: dist.Normal(torch.arange(float(layer.rank)), 1.0),
        dist.Normal(torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0]), 1.0),
    ),
    "an event per layer": (
        lambda layer: dist.Normal(torch.arange(float(layer.rank)), 1.0).to_event(1),
        dist.Normal(torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0]), 1.0),
    ),
}


@pytest.mark.parametrize("case", VALID)
def test_a_prior_is_one_site_s_with_the_density_that_was_asked_for(case):
    given, expected = VALID[case]
    prior = as_prior(given, SUBSPACE)
    trace = poutine.trace(prior).get_trace()
    assert list(trace.stochastic_nodes) == ["s"]
    assert trace.nodes["s"]["value"].shape == (D,)
    assert trace.nodes["s"]["fn"].event_shape == (D,)
    s = torch.tensor([0.1, 0.7, 1.3, 2.0, 3.1])
    torch.testing.assert_close(log_prob(prior, s), expected.log_prob(s).sum(), check_dtype=False)


@pytest.mark.parametrize("case", VALID)
def test_a_prior_gives_batches_of_latents_inside_a_plate(case):
    prior = as_prior(VALID[case][0], SUBSPACE)
    with pyro.plate("rows", 4):
        s = prior()
    assert s.shape == (4, D)
    assert len(s.unique(dim=0)) == 4


def test_the_default_prior_is_standard_normal(llm):
    blora = sp.bayesian_lora(llm)
    zeros = torch.zeros(blora.subspace.dim)
    assert kl_divergence(blora.prior.distribution(), dist.Normal(zeros, 1.0).to_event(1)).item() == 0


@pytest.mark.parametrize(
    ("base", "latents"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("prior", [0.5, dist.Normal(0.0, 0.5), dist.Normal(torch.zeros(()).double(), 0.5)], ids=str)
def test_latents_have_at_least_single_precision_over_any_model(base, latents, prior):
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=base), prior=prior)
    assert blora.sample_latents().dtype == latents


def test_a_multivariate_prior_keeps_its_correlations():
    tril = torch.tril(torch.arange(1.0, 26.0).reshape(D, D) / 10)
    for given in (
        dist.MultivariateNormal(VECTOR, scale_tril=tril),
        dist.MultivariateNormal(VECTOR, covariance_matrix=tril @ tril.T),
    ):
        built = as_prior(given, SUBSPACE).distribution()
        torch.testing.assert_close(built.mean, VECTOR)
        torch.testing.assert_close(built.covariance_matrix, tril @ tril.T, rtol=1e-4, atol=1e-4)


def test_a_low_rank_prior_keeps_its_covariance():
    factor = torch.arange(10.0).reshape(D, 2)
    given = dist.LowRankMultivariateNormal(VECTOR, factor, VECTOR)
    built = as_prior(given, SUBSPACE).distribution()
    torch.testing.assert_close(built.covariance_matrix, factor @ factor.T + torch.diag(VECTOR))


def test_the_layers_are_offered_to_a_prior_by_layer_in_order():
    seen = []

    def prior(layer):
        seen.append((layer.name, layer.rank, layer.out_features, layer.in_features))
        return dist.Normal(0.0, 1.0)

    as_prior(prior, SUBSPACE)
    assert seen == [("low.q_proj", 2, 6, 7), ("high.v_proj", 3, 6, 7)]


def test_the_numbers_of_a_prior_are_copied():
    scale = torch.ones(D)
    prior = as_prior(dist.Normal(0.0, scale), SUBSPACE)
    scale.fill_(9.0)
    assert prior.distribution().stddev.tolist() == [1.0] * D


def test_a_fixed_prior_has_nothing_to_learn_and_moves_and_saves_its_numbers():
    prior = as_prior(dist.Normal(torch.tensor(1.0, requires_grad=True), 2.0), SUBSPACE)
    assert list(prior.parameters()) == []
    assert set(prior.state_dict()) == {"loc", "scale"}
    other = FixedPrior(dist.Normal, {"loc": torch.zeros(D), "scale": torch.ones(D)})
    other.load_state_dict(prior.state_dict())
    assert kl_divergence(other.distribution(), prior.distribution()).item() == 0
    assert prior.double()().dtype == torch.float64
    assert "Normal(loc, scale)" in repr(prior)


# wrong priors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, -3, math.inf, math.nan])
def test_a_scale_that_is_not_positive_and_finite_is_refused(scale):
    with pytest.raises(ValueError, match=rf"prior={scale}: a scale \(standard deviation\) must be positive and finite"):
        as_prior(scale, SUBSPACE)


@pytest.mark.parametrize("prior", [None, [1.0], {"scale": 1.0}, dist.Normal, Prior], ids=repr)
def test_something_that_is_no_prior_is_refused_with_what_is_one(prior):
    with pytest.raises(TypeError, match=rf"prior={re.escape(repr(prior))}.*(dist\.Normal\(|layer -> distribution)"):
        as_prior(prior, SUBSPACE)


@pytest.mark.parametrize("scale", [np.float32(2), np.float64(2), np.int64(2)], ids=lambda x: type(x).__name__)
def test_a_scale_may_be_a_number_of_numpy(scale):
    assert as_prior(scale, SUBSPACE).distribution().stddev.tolist() == [2.0] * D


@pytest.mark.parametrize(
    ("prior", "shape"),
    [
        (dist.Normal(torch.zeros(4), 1.0), "batch shape (4,)"),
        (dist.Normal(torch.zeros(1, D), 1.0), "batch shape (1, 5)"),
        (dist.Normal(torch.zeros(2, D), 1.0).to_event(1), "batch shape (2,)"),
        (dist.Normal(torch.zeros(4), 1.0).to_event(1), "event shape (4,)"),
        (dist.MultivariateNormal(torch.zeros(6), torch.eye(6)), "event shape (6,)"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_a_shape_that_does_not_fit_the_latents_is_refused_with_the_one_that_does(prior, shape):
    with pytest.raises(ValueError, match=rf"{re.escape(shape)}.*there are 5 latents.*scalar.*shape \(5,\)"):
        as_prior(prior, SUBSPACE)


def test_a_shape_that_does_not_fit_a_layer_is_refused_with_its_rank():
    with pytest.raises(ValueError, match=r"batch shape \(4,\).*there are 2 latents"):
        as_prior(lambda layer: dist.Normal(torch.zeros(4), 1.0), SUBSPACE)


@pytest.mark.parametrize(
    "prior",
    [
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()]),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)),
        dist.Normal(0.0, 1.0).mask(False),
    ],
    ids=lambda d: type(d).__name__,
)
def test_a_distribution_without_parameters_to_save_is_refused_with_the_way_out(prior):
    with pytest.raises(ValueError, match=rf"{type(prior).__name__} cannot be rebuilt.*scalabl_pyro.priors.Prior"):
        as_prior(prior, SUBSPACE)


@pytest.mark.parametrize(
    "prior",
    [dist.Poisson(1.0), dist.Bernoulli(0.5), dist.Categorical(torch.ones(3)), dist.Geometric(0.5)],
    ids=lambda d: type(d).__name__,
)
def test_a_discrete_prior_is_refused_because_s_is_real(prior):
    with pytest.raises(ValueError, match=rf"{type(prior).__name__}.*(discrete|continuous|real)"):
        as_prior(prior, SUBSPACE)


@pytest.mark.parametrize("returned", [1.0, None, dist.Normal], ids=repr)
def test_a_prior_by_layer_that_returns_no_distribution_is_refused_with_the_layer(returned):
    with pytest.raises(TypeError, match=rf"prior\('low.q_proj'\) returned {type(returned).__name__}"):
        as_prior(lambda layer: returned, SUBSPACE)


def test_families_that_differ_by_layer_are_refused_by_name():
    def prior(layer):
        return dist.Normal(0.0, 1.0) if layer.rank == 2 else dist.Laplace(0.0, 1.0)

    with pytest.raises(ValueError, match=r"one univariate family.*\['Laplace', 'Normal'\].*scalabl_pyro.priors.Prior"):
        as_prior(prior, SUBSPACE)


@pytest.mark.parametrize(
    "prior",
    [
        lambda layer: dist.MultivariateNormal(torch.zeros(layer.rank), torch.eye(layer.rank)),
        lambda layer: dist.LowRankMultivariateNormal(
            torch.zeros(layer.rank), torch.ones(layer.rank, 1), torch.ones(layer.rank)
        ),
        lambda layer: dist.Dirichlet(torch.ones(layer.rank)),
    ],
    ids=["MultivariateNormal", "LowRankMultivariateNormal", "Dirichlet"],
)
def test_a_multivariate_family_by_layer_is_refused_because_joining_it_would_couple_layers(prior):
    with pytest.raises(ValueError, match="univariate"):
        as_prior(prior, SUBSPACE)


# own programs -------------------------------------------------------------------------------------------------


class Horseshoe(Prior):
    """A latent scale, and a learned one."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.log_width = nn.Parameter(torch.zeros(()))

    def forward(self):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        scale = (tau * self.log_width.exp()).unsqueeze(-1).expand(*tau.shape, self.dim)
        return pyro.sample("s", dist.Normal(0.0, scale).to_event(1))


def test_a_program_is_a_prior_as_it_is(llm, stock_pyro):
    prior = Horseshoe(40)
    assert as_prior(prior, SUBSPACE) is prior
    blora = sp.bayesian_lora(llm, prior=prior)
    assert blora.prior is prior
    trace = poutine.trace(blora).get_trace(input_ids=torch.tensor([[3, 4, 5]]))
    assert {"tau", "s"} <= set(trace.stochastic_nodes)
    assert any(p is prior.log_width for p in blora.parameters())


def test_a_program_without_forward_says_what_is_missing():
    class Empty(Prior):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty must define forward\(\), which samples the site 's'"):
        Empty()()
