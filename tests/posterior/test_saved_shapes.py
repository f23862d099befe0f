"""Names and shapes that options imply are those of the guides that are built from them, for every family and prior."""

import time

import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer import autoguide

import scalabl_pyro as sp
from scalabl_pyro import guides, priors
from scalabl_pyro.guides import AutoFamily, EmpiricalGuide, FlowGuide, LowRankGuide, MixtureGuide, as_guide
from scalabl_pyro.guides.saved_shapes import check_saved_shapes, saved_shapes
from scalabl_pyro.priors.saved_distribution import MULTIVARIATE, UNIVARIATE, from_parameters, known_family
from scalabl_pyro.storage.budget import Budget


def auto(name, **options):
    return lambda b: AutoFamily(b.prior, getattr(autoguide, name), init_loc_fn=b.init_loc, **options)


def points(b):
    sites = {name: site["median"].repeat(6, *[1] * site["median"].dim()) for name, site in priors_of(b).items()}
    return EmpiricalGuide(sites, num_chains=2, statistics={"energy": torch.zeros(6)})


def priors_of(b):
    from scalabl_pyro.priors.sites import prior_sites

    return prior_sites(b.prior)


def flow(b):
    return FlowGuide(b.adapter.loc, torch.ones_like(b.adapter.loc), num_transforms=3, hidden=20)


def lowrank(b):
    return LowRankGuide(b.adapter.loc, torch.ones_like(b.adapter.loc), rank=3)


BUILT = {
    **{name: name for name in ("normal", "layer_covariance", "full_covariance", "lowrank", "flow", "delta")},
    "points": points,
    "deep flow": flow,
    "rank 3": lowrank,
    "mixture": lambda b: MixtureGuide([lowrank(b), flow(b), MixtureGuide([as_guide("normal", b), points(b)])]),
    "mixture of AutoGuides": lambda b: MixtureGuide([auto("AutoGaussian")(b), auto("AutoDelta")(b)]),
    **{name: auto(name) for name in ("AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoDelta")},
    **{name: auto(name) for name in ("AutoGaussian", "AutoIAFNormal", "AutoLowRankMultivariateNormal")},
    "AutoIAFNormal, deep": auto("AutoIAFNormal", num_transforms=2, hidden_dim=[30, 31]),
    "AutoLowRank, 2": auto("AutoLowRankMultivariateNormal", rank=2),
}


@pytest.mark.filterwarnings("ignore:The `init_loc_fn` argument")
@pytest.mark.parametrize("prior", ["normal", "horseshoe", "hierarchical", "empirical", "lognormal", "rank_mask"])
@pytest.mark.parametrize("name", BUILT)
def test_shapes_are_those_of_the_guide(name, prior):
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, target_modules=["q_proj", "v_proj"], prior=prior)
    try:
        guide = as_guide("rank_mask" if prior == "rank_mask" else BUILT[name], blora)
    except ValueError as error:
        assert prior == "lognormal" and "needs latents on the real line" in str(error)  # a family by name
        return
    config = guides.to_config(guide)
    ranks, budget = blora.subspace.ranks, Budget()
    shapes = saved_shapes(config["family"], config["options"], blora.prior, ranks, budget=budget, file="f")
    state = guide.state_dict()
    check_saved_shapes("guide", state, shapes)
    if "AutoGaussian" not in str(config):
        assert shapes == {key: tuple(value.shape) for key, value in state.items()}
    surplus = {**state, "surplus": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unexpected \['surplus'\]"):
        check_saved_shapes("guide", surplus, shapes)


EXTREMES = [1e-45, 1e-38, 1e-10, 0.5, 1.0, 1.5, 1e3, 1e9, 1e10, 1e20, 1e38, 3e38]


@pytest.mark.parametrize("name", UNIVARIATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_every_allowed_prior_take_a_bounded_time(name, dtype):
    known = getattr(getattr(dist, name), "arg_constraints", {})
    names = [key for key in known if key != "logits"] if isinstance(known, dict) else ["low", "high"]
    family, built, start = known_family(name, names), 0, time.perf_counter()
    for which in [*names, None]:
        for extreme in EXTREMES:
            values = {key: extreme if which in (key, None) else 0.5 for key in names}
            if name == "Uniform":
                values["low"] = -extreme
            try:
                prior = from_parameters(family, {k: torch.full((3,), v, dtype=dtype) for k, v in values.items()}, 3)
            except ValueError:
                continue
            built += 1
            prior.distribution().sample(torch.Size((101,)))
    assert built and time.perf_counter() - start < 10


@pytest.mark.parametrize("name", sorted({*dist.__all__} - {*UNIVARIATE, *MULTIVARIATE}))
def test_any_other_class_of_pyro_is_refused(name):
    with pytest.raises(ValueError, match="is not a known prior"):
        known_family(name, ["loc", "scale"])


def test_every_prior_that_can_be_made_can_be_loaded():
    made = [dist.Normal(0.0, 1.0), dist.Gamma(2.0, 2.0), dist.Beta(2.0, 2.0), dist.Uniform(-1.0, 1.0)]
    made += [dist.MultivariateNormal(torch.zeros(4), torch.eye(4)), dist.VonMises(0.0, 3.0), dist.Stable(1.5, 0.5)]
    made += [dist.LowRankMultivariateNormal(torch.zeros(4), torch.ones(4, 2), torch.ones(4))]
    made += [dist.MultivariateStudentT(torch.tensor(4.0), torch.zeros(4), torch.eye(4))]
    made += [dist.MixtureOfDiagNormals(torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3))]
    blora = sp.bayesian_lora(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), r=2)
    for distribution in made:
        prior = priors.as_prior(distribution, blora.subspace)
        again = priors.from_saved(priors.to_config(prior), dict(prior.named_buffers()), blora.subspace)
        assert str(again) == str(prior)
        assert all(torch.equal(one, other) for one, other in zip(again.buffers(), prior.buffers(), strict=True))
