"""Priors on any support: guides stay inside, starts lie inside, and what cannot work says why."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer import autoguide
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn
from torch.distributions import constraints

import scalabl_pyro as sp
from scalabl_pyro.guides import NAMES, Guide, as_guide
from scalabl_pyro.guides.auto import INCOMPLETE, UNSUPPORTED
from scalabl_pyro.lora.subspace import Layer, Subspace
from scalabl_pyro.priors import Prior, as_prior
from scalabl_pyro.training.objective import default_elbo

SUBSPACE = Subspace((Layer("low.q_proj", 2, 7, 6), Layer("high.v_proj", 3, 7, 6)))
D = 4


class RealMixture(dist.MixtureSameFamily):
    """A mixture that states its support."""

    support = constraints.real


class Program(Prior):
    """A prior that samples s from the distribution that a function builds."""

    def __init__(self, build):
        super().__init__()
        self.build = build

    def forward(self):
        return pyro.sample("s", self.build().to_event(1))


def spike_and_slab(family):
    weights, scales = torch.tensor([0.8, 0.2]).repeat(D, 1), torch.tensor([0.05, 1.0]).repeat(D, 1)
    return lambda: family(dist.Categorical(weights), dist.Normal(torch.zeros_like(scales), scales))


def transformed(*transforms):
    return lambda: dist.TransformedDistribution(dist.Normal(torch.zeros(D), 1.0), list(transforms))


REAL = {
    "normal": dist.Normal(0.0, 1.0),
    "student_t": dist.StudentT(4.0, 0.0, 1.0),
    "stable": dist.Stable(1.5, 0.0),
    "transformed inside": dist.Gumbel(0.0, 1.0),  # states its support, and cannot go far down by its transforms
    "multivariate": dist.MultivariateNormal(torch.zeros(D), torch.eye(D) + 0.5),
    "spike and slab": Program(spike_and_slab(RealMixture)),
    "affine of one": Program(
        lambda: dist.TransformedDistribution(
            dist.Gumbel(torch.zeros(D), 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
        )
    ),
    "affine": Program(transformed(dist.transforms.AffineTransform(0.5, 2.0))),
}
BOUNDED = {
    "positive": dist.LogNormal(0.0, 1.0),
    "from 0": dist.HalfNormal(1.0),
    "gamma": dist.Gamma(2.0, 2.0),
    "unit interval": dist.Beta(2.0, 2.0),
    "unit interval by probs": dist.ContinuousBernoulli(0.3),
    "around -1 and 1": dist.Uniform(-3.0, 3.0),
    "-1 to 1": dist.AffineBeta(2.0, 2.0, -1.0, 2.0),
    "below the start": dist.Uniform(0.0, 0.1),
    "above the start": dist.Uniform(1.0, 2.0),
    "negative": dist.Uniform(-2.0, -1.0),
    "from 1": dist.Pareto(1.0, 3.0),
    "by latent": dist.Uniform(torch.tensor([-3.0, 0.0, 0.0, 1.0]), torch.tensor([3.0, 0.1, 1.0, 2.0])),
    "by layer": lambda layer: dist.Uniform(-1.0, 2.0) if layer.name == "0" else dist.Uniform(0.0, 1.0),
    "logit-normal": Program(transformed(dist.transforms.SigmoidTransform())),
}
AUTO = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoGaussian,
    AutoDelta,
)
FOLLOWS = ("normal", "delta", *AUTO)
FOR_REAL = tuple(name for name in NAMES if name not in (*FOLLOWS, "rank_mask"))


def named(cases):
    return [getattr(case, "__name__", case) for case in cases]


#: A flow of Pyro averages 1000 draws for its mean, so it takes part in a few cases.
SWEEP = [
    (name, guide)
    for name in (*REAL, *BOUNDED)
    for guide in (*FOLLOWS, *FOR_REAL)
    if guide is not AutoIAFNormal or name in ("normal", "around -1 and 1")
]


def two_layers(prior):
    return sp.bayesian_lora(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), r=2, prior=prior)


def draws_and_elbo(blora, guide):
    """Draws, and values of the ELBO where the likelihood is 1."""
    inside = guide.sample(50, seed=0)["s"]
    elbo = default_elbo(guide, blora.prior)
    with torch.no_grad(), torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        torch.manual_seed(0)
        values = [elbo.differentiable_loss(blora.prior, guide) for _ in range(5)]
    return inside, torch.stack([torch.as_tensor(value) for value in values])


@pytest.mark.parametrize(("name", "guide"), SWEEP, ids=["-".join(named(case)) for case in SWEEP])
def test_draws_lie_in_the_support_and_the_elbo_is_finite_or_the_guide_is_refused(name, guide, caplog):
    blora = two_layers({**REAL, **BOUNDED}[name])
    if name in BOUNDED and guide in FOR_REAL:
        with pytest.raises(ValueError, match=rf"guide='{guide}' needs latents on the real line.*: use 'normal'"):
            as_guide(guide, blora)
        return
    built = as_guide(guide, blora, init_scale=0.5)
    if guide == "svgd":  # its points are moved, not drawn
        assert built.particles.isfinite().all()
        return
    inside, values = draws_and_elbo(blora, built)
    with torch.no_grad(), pyro.poutine.trace() as tracer, torch.random.fork_rng():
        blora.prior()
    support = tracer.trace.nodes["s"]["fn"].support
    assert support.check(inside).all() and inside.isfinite().all()
    assert values.isfinite().all()
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        assert support.check(built.mean()["s"]).all()
    warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
    off_start = ("below the start", "above the start", "negative", "from 1", "by latent")
    assert bool(warned) is (name in off_start)


@pytest.mark.parametrize("guide", ["normal", AutoNormal], ids=["normal", "AutoNormal"])
@pytest.mark.parametrize("name", ["around -1 and 1", "unit interval", "from 1", "below the start"])
def test_the_guide_of_a_bounded_prior_learns_that_prior_where_there_are_no_data(name, guide):
    """With a likelihood of 1 the posterior is the prior. A mean-field normal can come near it, not match it."""
    blora = two_layers(BOUNDED[name])
    built = as_guide(guide, blora, init_scale=0.5)
    elbo = default_elbo(built, blora.prior)
    optimizer = torch.optim.Adam(built.parameters(), lr=0.05)
    with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        torch.manual_seed(0)
        for _ in range(150):
            optimizer.zero_grad()
            loss = sum(elbo.differentiable_loss(blora.prior, built) for _ in range(2))
            loss.backward()
            optimizer.step()
    _, values = draws_and_elbo(blora, built)
    assert values.mean() < 0.15 * D  # nats: the KL of each latent


def test_a_bounded_prior_trains_samples_and_loads(tmp_path, task):
    rows = tiny.question_rows(8)
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2, prior=dist.Uniform(-3.0, 3.0))
    options = {"num_steps": 30, "lr": 0.05, "progress": False, "optimizer": {"lr_loc": 1.0, "lr_scale": 0.5}}
    posterior = sp.fit(blora, task, rows, **options).posterior
    assert (posterior.sample(100).s.abs() < 3).all()
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    assert torch.equal(loaded.sample(3).s, posterior.sample(3).s)
    chain = sp.mcmc(posterior, rows, num_samples=4, warmup_steps=2, num_chains=1, max_tree_depth=2, progress=False)
    assert (chain.sample(4).s.abs() < 3).all()


def test_a_start_outside_of_the_support_moves_to_the_median_and_says_so(caplog):
    blora = two_layers(BOUNDED["by latent"])
    loc = blora.adapter.loc
    start = blora.init_loc({"name": "s", "fn": blora.prior.distribution()})
    kept = torch.tensor([True, False, bool(loc[2] < 1), bool(loc[3] > 1)])
    assert torch.equal(start[kept], loc[kept])
    assert 0 < start[1] < 0.1 and 1 < start[3] < 2
    assert f"{int((~kept).sum())} of 4 latents would start outside of the support" in caplog.text


# guides of the user's own ------------------------------------------------------------------------------------------


class Own(Guide):
    """A guide that samples s from the distribution that a function builds."""

    def __init__(self, build):
        super().__init__()
        self.build = build

    def forward(self, *args, **kwargs):
        return pyro.sample("s", self.build().to_event(1))

    def mean(self):
        return {"s": torch.full((D,), 0.5)}


HALF = torch.full((D,), 0.5)
#: Each stays inside with nearly all draws.
MAY_LEAVE = {
    ("around -1 and 1", "normal"): lambda: dist.Normal(HALF, 1e-3),
    ("around -1 and 1", "scaled normal"): lambda: dist.TransformedDistribution(
        dist.Normal(HALF, 1e-3), [dist.transforms.AffineTransform(0.0, 1.0)]
    ),
    ("around -1 and 1", "log-normal"): lambda: dist.LogNormal(HALF.log(), 1e-3),
    ("from 0", "normal"): lambda: dist.Normal(HALF, 1e-3),
    ("unit interval", "half-normal"): lambda: dist.HalfNormal(1e-3 * HALF),
    ("unit interval", "wider interval"): lambda: dist.Uniform(0 * HALF, 1.01 * torch.ones(D)),
}
STAYS = {
    ("around -1 and 1", "beta"): lambda: dist.Beta(HALF, 1.0),
    ("around -1 and 1", "same"): lambda: dist.Uniform(-3 * torch.ones(D), 3 * torch.ones(D)),
    ("from 0", "gamma"): lambda: dist.Gamma(HALF, 1.0),
    ("from 0", "log-normal"): lambda: dist.LogNormal(HALF, 1.0),
    ("unit interval", "sigmoid"): transformed(dist.transforms.SigmoidTransform()),
    ("normal", "beta"): lambda: dist.Beta(HALF, 1.0),
}


@pytest.mark.parametrize(("prior", "family"), MAY_LEAVE, ids=map("-".join, MAY_LEAVE))
def test_a_guide_that_can_leave_the_support_is_refused_though_its_draw_is_inside(prior, family):
    blora = two_layers(BOUNDED[prior])
    with pytest.raises(ValueError, match=r"The guide puts 's' outside the support.*or can do so.*guide='normal'"):
        default_elbo(Own(MAY_LEAVE[prior, family]), blora.prior)


@pytest.mark.parametrize(("prior", "family"), STAYS, ids=map("-".join, STAYS))
def test_a_guide_that_stays_in_the_support_is_accepted(prior, family):
    default_elbo(Own(STAYS[prior, family]), two_layers({**REAL, **BOUNDED}[prior]).prior)


def test_a_transformed_prior_whose_support_torch_misstates_is_told_to_state_it():
    to_3 = dist.transforms.AffineTransform(-3.0, 6.0)
    blora = two_layers(Program(transformed(dist.transforms.SigmoidTransform(), to_3)))
    with pytest.raises(
        ValueError, match=r"claims the real line as its support, but its transforms cannot reach -10.*interval"
    ):
        default_elbo(as_guide("full_covariance", blora), blora.prior)


# priors that cannot be ---------------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "simplex": (dist.Dirichlet(torch.ones(5)), "Dirichlet constrains its numbers jointly.*dist.Gamma"),
    "sphere": (dist.ProjectedNormal(torch.ones(5)), "ProjectedNormal constrains its numbers jointly"),
    "matrix": (dist.LKJCholesky(3, 1.0), "LKJCholesky constrains its numbers jointly"),
    "point": (dist.Delta(torch.tensor(1.0)), "A Delta fixes s.*baselines.mle.*dist.Normal"),
    "points": (dist.Delta(torch.ones(5)).to_event(1), "A Delta fixes s"),
    "counts": (dist.Poisson(1.0), "discrete"),
    "transformed": (
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]),
        "TransformedDistribution cannot be rebuilt.*scalabl_pyro.priors.Prior.*'Own prior'",
    ),
    "mixture": (spike_and_slab(dist.MixtureSameFamily)(), "MixtureSameFamily cannot be rebuilt.*'Own prior'"),
    "masked mixture": (
        dist.MaskedMixture(torch.tensor(True), dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)),
        "MaskedMixture cannot be rebuilt",
    ),
    "simplex by layer": (lambda layer: dist.Dirichlet(torch.ones(layer.rank)), "Dirichlet constrains its numbers"),
    "point by layer": (lambda layer: dist.Delta(torch.tensor(1.0)), "A Delta fixes s"),
    "families by layer": (
        lambda layer: dist.Normal(0.0, 1.0) if layer.rank == 2 else dist.Gamma(1.0, 1.0),
        r"one univariate family.*\['Gamma', 'Normal'\]",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_distribution_that_cannot_be_a_prior_says_why_and_what_can(case):
    prior, message = IMPOSSIBLE[case]
    with pytest.raises(ValueError, match=message):
        as_prior(prior, SUBSPACE)


@pytest.mark.parametrize("prior", [lambda: dist.Normal(0.0, 1.0), lambda a, b: dist.Normal(a, b)], ids=["none", "two"])
def test_a_function_that_does_not_take_a_layer_is_told_what_it_gets(prior):
    with pytest.raises(TypeError, match=r"does not take one argument.*lambda layer: dist.Normal\(0.0, 1.0\)"):
        as_prior(prior, SUBSPACE)


def test_an_error_inside_of_a_function_of_layers_is_not_hidden():
    with pytest.raises(TypeError, match="unsupported operand"):
        as_prior(lambda layer: dist.Normal(0.0, layer + 1), SUBSPACE)


def test_an_infinite_bound_is_refused_with_the_supports_that_work():
    blora = two_layers(dist.GeneralizedPareto(0.0, 1.0, 0.1)) if hasattr(dist, "GeneralizedPareto") else None
    if blora is None:
        pytest.skip("this Pyro has no distribution with an infinite bound")
    for guide in ("normal", "delta", AutoNormal):
        with pytest.raises(ValueError, match=r"upper_bound=inf.* cannot be reached from the real line.*finite bounds"):
            as_guide(guide, blora)


def test_a_support_without_a_transform_is_named():
    prior = Program(spike_and_slab(dist.MixtureSameFamily))
    blora = two_layers(prior)
    inside, values = draws_and_elbo(blora, as_guide("normal", blora))
    assert inside.isfinite().all() and values.isfinite().all()
    with pytest.raises(ValueError, match=r"guide=AutoNormal has no transform.*'s'.*support = constraints.real"):
        as_guide(AutoNormal, blora)


def test_hyperparameters_on_a_simplex_get_a_guide():
    class Weighted(Prior):
        def forward(self):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
            scale = (weights * torch.tensor([0.1, 1.0, 3.0])).sum(-1, keepdim=True)
            return pyro.sample("s", dist.Normal(0.0, scale.expand(*scale.shape[:-1], D)).to_event(1))

    blora = two_layers(Weighted())
    guide = as_guide("normal", blora, init_scale=0.5)
    draws = guide.sample(50, seed=0)
    assert draws["weights"].shape == (50, 3)
    torch.testing.assert_close(draws["weights"].sum(-1), torch.ones(50))
    assert draws_and_elbo(blora, guide)[1].isfinite().all()


# Pyro's classes of guides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in autoguide.__all__ if isinstance(getattr(autoguide, n), type)])
def test_every_class_of_pyro_is_a_guide_or_is_refused_with_the_way_out(name):
    blora, auto_class = two_layers(1.0), getattr(autoguide, name)
    try:
        guide = as_guide(auto_class, blora)
    except ValueError as error:
        assert name in str(error) and any(way in str(error) for way in ("stock SVI", "AutoFamily", "write a Guide"))
        return
    assert guide.sample(2, seed=0)["s"].shape == (2, D)


@pytest.mark.parametrize("as_instance", [True, False], ids=["instance", "class"])
@pytest.mark.parametrize("name", [n for n in autoguide.__all__ if n.endswith("NormalMessenger")])
def test_messengers_are_told_from_autoguides(name, as_instance):
    blora, messenger = two_layers(1.0), getattr(autoguide, name)
    with pytest.raises(ValueError, match=f"{name} is a messenger.*guide='normal'.*stock SVI"):
        as_guide(messenger(blora.prior) if as_instance else messenger, blora)


def test_the_names_of_refused_classes_exist():
    assert {*UNSUPPORTED, *INCOMPLETE} <= set(autoguide.__all__)


# where s starts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1024, 8])
def test_the_median_of_the_log_normal_is_where_s_starts_in_wide_layers_only(width):
    blora = sp.bayesian_lora(nn.Sequential(nn.Linear(width, 4)), r=4, prior="lognormal")
    far = (blora.adapter.loc / math.exp(-0.55)).log().abs().max()
    assert bool(far < 0.1) is (width == 1024)
