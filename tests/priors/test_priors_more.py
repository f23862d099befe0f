"""Priors with own latents or parameters, the prior on the factors, and programs that are neither prior nor guide."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from gaussians import posterior_of, solve
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, autoguide
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import nn
from toys import NOISE, LinearGaussian, LinearToy

import scalabl_pyro as sp
from scalabl_pyro.data import encode
from scalabl_pyro.data.training_batches import TrainingBatches
from scalabl_pyro.guides import Guide, NormalGuide, RankMaskGuide, as_guide
from scalabl_pyro.guides.rank_mask import StraightThroughBernoulli
from scalabl_pyro.lora.subspace import Layer, Subspace
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.priors import EmpiricalBayesPrior, HierarchicalPrior, HorseshoePrior, Prior, RankMaskPrior, as_prior
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo

SUBSPACE = Subspace((Layer("low.q_proj", 2, 7, 6), Layer("high.v_proj", 3, 7, 6)))
S = np.array([0.1, -0.7, 1.3, 2.0, -0.05])
QUIET = {"progress": False}


def log_joint(prior, sites):
    """Log density of all sites of a prior, from numbers."""
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in sites.items()}
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        return poutine.trace(poutine.condition(prior.double(), data=given)).get_trace().log_prob_sum().item()


# densities ----------------------------------------------------------------------------------------------------


def test_the_horseshoe_has_the_density_of_its_paper():
    """In precisions: 1 / variance = 1 / slab variance + 1 / (global local)^2."""
    tau, slab, df = 0.3, 1.5, 5.0
    c2, g, local = 2.2, 0.4, np.array([0.2, 1.0, 3.0, 8.0, 0.01])
    precision = 1 / c2 + 1 / (g * local) ** 2
    expected = (
        stats.gamma(df / 2, scale=2 / (df * slab**2)).logpdf(1 / c2)  # the precision is Gamma,
        - 2 * math.log(c2)  # its inverse has this Jacobian
        + stats.halfcauchy(scale=tau).logpdf(g)
        + stats.halfcauchy().logpdf(local).sum()
        + (0.5 * np.log(precision / (2 * math.pi)) - 0.5 * precision * S**2).sum()
    )
    prior = as_prior(HorseshoePrior(tau, slab, df), SUBSPACE)
    found = log_joint(prior, {"slab_variance": c2, "global_scale": g, "local_scale": local, "s": S})
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_hierarchical_prior_is_a_half_cauchy_a_layer():
    scales = np.array([0.3, 2.5])
    expected = stats.halfcauchy(scale=0.7).logpdf(scales).sum() + stats.norm(0, scales[[0, 0, 1, 1, 1]]).logpdf(S).sum()
    found = log_joint(as_prior(HierarchicalPrior(0.7), SUBSPACE), {"layer_scale": scales, "s": S})
    assert found == pytest.approx(expected, rel=1e-6)
    draws = as_prior(HierarchicalPrior(0.7), SUBSPACE)
    with torch.no_grad(), pyro.plate("draws", 4000):
        trace = poutine.trace(draws).get_trace()
    below = (trace.nodes["layer_scale"]["value"] < 0.7).double().mean()
    assert abs(below - 0.5) < 5 * 0.5 / 8000**0.5  # it is the median


@pytest.mark.parametrize(("per", "scales"), [("layer", [0.3, 2.5]), ("global", [0.8])])
def test_the_empirical_prior_is_normal_with_the_scale_of_its_group(per, scales):
    prior = as_prior(EmpiricalBayesPrior(per), SUBSPACE)
    prior.scale = torch.tensor(scales)
    each = np.array(scales)[[0, 0, 1, 1, 1] if per == "layer" else [0] * 5]
    assert log_joint(prior, {"s": S}) == pytest.approx(stats.norm(0, each).logpdf(S).sum(), rel=1e-6)


def test_the_mask_prior_is_bernoulli():
    mask = np.array([1.0, 0, 1, 1, 1])
    found = log_joint(as_prior(RankMaskPrior(0.8), SUBSPACE), {"s": mask})
    assert found == pytest.approx(4 * math.log(0.8) + math.log(0.2), rel=1e-6)


@pytest.mark.parametrize("name", ["horseshoe", "hierarchical", "empirical", "rank_mask"])
def test_a_plate_of_draws_gives_each_its_own(name):
    draws = pyro.plate("draws", 50, dim=-2)
    with torch.no_grad(), pyro.settings.context(module_local_params=True), draws, torch.random.fork_rng():
        torch.manual_seed(0)  # few masks of five latents differ, so a seed must not decide by chance
        trace = poutine.trace(as_prior(name, SUBSPACE)).get_trace()
    assert trace.nodes["s"]["value"].shape == (50, 1, 5) and trace.nodes["s"]["fn"].event_shape == (5,)
    for site in trace.stochastic_nodes:
        assert len(trace.nodes[site]["value"].unique(dim=0)) > 5, site


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HorseshoePrior(global_scale=0), "global_scale=0 must be positive and finite"),
        (lambda: HorseshoePrior(df=math.inf), "df=inf must be positive and finite"),
        (lambda: HierarchicalPrior(scale="1"), "scale='1' must be positive and finite"),
        (lambda: EmpiricalBayesPrior(scale=-1), "scale=-1 must be positive and finite"),
        (lambda: EmpiricalBayesPrior(per="rank"), "per='rank' is unknown.*'global', 'layer'"),
        (lambda: RankMaskPrior(1.0), "probability=1.0 must lie between 0 and 1"),
        (lambda: RankMaskPrior(True), "probability=True must lie between 0 and 1"),
    ],
)
def test_a_wrong_hyperparameter_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_prior_that_knows_its_latents_is_not_taken_to_another_model():
    prior = as_prior(HierarchicalPrior(), SUBSPACE)
    assert as_prior(prior, SUBSPACE) is prior
    other = Subspace((Layer("q_proj", 4, 7, 6),))
    with pytest.raises(ValueError, match="This HierarchicalPrior belongs to a model with 5 latents: make a new one"):
        as_prior(prior, other)


# what is learned ------------------------------------------------------------------------------------------------

DIM = 4


class TwoLayers(nn.Module):
    """The sum of two linear layers, each of which sees half of the features."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(DIM, DIM, bias=False, dtype=torch.float64) for _ in range(2))
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.second.weight)

    def forward(self, input_ids, attention_mask=None):
        x = input_ids.double()
        return (self.first(x[:, :DIM]) + self.second(x[:, DIM:])).sum(-1, keepdim=True)


def two_layers(prior, truth):
    """A program whose output is x's, and 64 rows of it: orthogonal features, so that the posterior is factorized."""
    options = {"r": DIM, "lora_alpha": DIM, "target_modules": ["first", "second"]}
    blora = sp.bayesian_lora(TwoLayers(), prior=prior, **options)
    with torch.no_grad():
        for A, B in blora.adapter.factors():
            A.copy_(torch.eye(DIM))
            B.copy_(torch.eye(DIM))
    blora.point_estimates.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.linalg.qr(torch.randn(64, 2 * DIM, generator=generator, dtype=torch.float64)).Q
    y = x @ torch.tensor(truth).double() + NOISE * torch.randn(64, generator=generator, dtype=torch.float64)
    return blora, [{"x": a.tolist(), "y": b.item()} for a, b in zip(x, y, strict=True)]


UNEQUAL = [3.0, -2.0, 2.5, -3.0, 0.1, -0.1, 0.0, 0.2]  # the second layer is hardly needed
LEARN = {"num_steps": 500, "batch_size": 64, "optimizer": {"lr_loc": 0.05, "lr_scale": 0.05}, **QUIET}


@pytest.fixture(scope="module")
def learned():
    """Prior -> its posterior on the unequal layers."""
    priors = {"normal": 1.0, **{name: name for name in ("empirical", "hierarchical", "horseshoe")}}
    steps = {"empirical": 1500}  # its scale must come to rest
    return {
        name: sp.fit(*_problem(prior), **LEARN | {"num_steps": steps.get(name, 500)}).posterior
        for name, prior in priors.items()
    }


def _problem(prior):
    blora, rows = two_layers(prior, UNEQUAL)
    return blora, LinearGaussian(), rows


def test_an_empirical_scale_ends_at_its_fixed_point(learned):
    """scale^2 is the mean of loc^2 + sd^2 over the latents that share it (MacKay)."""
    posterior = learned["empirical"]
    guide, scale = posterior.guide, posterior.prior.scale
    second_moments = (guide.loc.square() + guide.scale.square()).unflatten(0, (2, DIM)).mean(1)
    torch.testing.assert_close(scale.square(), second_moments, rtol=0.02, atol=0)
    assert 2 < scale[0] < 3.5 and scale[1] < 0.25


def test_a_shared_empirical_scale_maximizes_the_evidence():
    """With orthogonal features the guide is exact, so that the ELBO is the evidence."""
    toy = LinearToy(4, prior=EmpiricalBayesPrior("global", scale=3.0))
    posterior = sp.fit(toy.blora, toy.task, toy.rows, **LEARN).posterior
    best = minimize_scalar(
        lambda t: -solve(toy.features, toy.y, math.exp(t)).evidence, bounds=(-3, 3), method="bounded"
    )
    assert posterior.prior.scale.item() == pytest.approx(math.exp(best.x), rel=0.03)


def test_inferred_layer_scales_shrink_the_layer_that_is_not_needed(learned):
    first, second = learned["hierarchical"].guide.mean()["layer_scale"]
    assert first > 1 > 0.5 > second


def exact_horseshoe_mean(rows, points=100):
    """Posterior mean under HorseshoePrior(0.1, 1, 4), summed over a grid of quantiles of its three scales.

    Features are orthogonal, so that each latent has its own least-squares estimate, of standard deviation NOISE / 4,
    and given the scales a normal posterior.
    """
    x, y = (np.array([row[key] for row in rows], dtype=np.float32).astype(float) for key in "xy")
    estimates, variance = x.T @ y / 16, NOISE**2 / 16
    quantiles = (np.arange(points) + 0.5) / points
    overall, local = stats.halfcauchy(scale=0.1).ppf(quantiles), stats.halfcauchy().ppf(quantiles)
    slab = stats.invgamma(2, scale=2).ppf(quantiles)[:, None]
    wide = np.square(overall[:, None, None] * local)  # (overall, slab, local)
    prior = slab * wide / (slab + wide)
    weights, means = np.ones((points, points)), []
    for estimate in estimates:
        density = stats.norm(0, np.sqrt(prior + variance)).pdf(estimate)
        means.append((density * prior / (prior + variance)).mean(-1) * estimate / density.mean(-1))
        weights *= density.mean(-1)
    return torch.tensor(np.stack(means)).mul(torch.tensor(weights / weights.sum())).sum((1, 2))


def test_the_horseshoe_finds_its_posterior_where_half_of_the_latents_are_large(learned):
    loc, exact = learned["horseshoe"].mean(), exact_horseshoe_mean(_problem("horseshoe")[2])
    small = slice(DIM, None)
    assert ((loc - exact).abs() < 0.03).all()
    assert (loc[small].abs() < 0.97 * learned["normal"].mean()[small].abs()).all()
    assert ((loc - torch.tensor(UNEQUAL).double())[:DIM].abs() < 0.6).all()


def test_the_horseshoe_shrinks_small_latents_and_leaves_a_large_one():
    """The more are small, the more it shrinks them; a factorized guide somewhat less than the exact posterior."""
    truth = [3.0, 0.0, 0.0, 0.0, 0.1, -0.1, 0.05, 0.1]
    loc = {}
    for prior in ("normal", "horseshoe"):
        blora, rows = two_layers(prior, truth)
        loc[prior] = sp.fit(blora, LinearGaussian(), rows, **LEARN).posterior.mean()
    exact, normal, small = exact_horseshoe_mean(rows), loc["normal"], slice(1, None)
    assert exact[small].norm() < 0.6 * normal[small].norm()
    assert loc["horseshoe"][small].norm() < 0.85 * normal[small].norm()
    assert ((loc["horseshoe"] - exact).abs() < 0.08).all()
    assert abs(loc["horseshoe"][0] - 3.0) < 0.3


def test_inferred_scales_are_saved_and_loaded_with_s(tmp_path):
    rows, task = tiny.question_rows(8), sp.MultipleChoice(tiny.tokenizer())
    for name in ("empirical", "hierarchical", "horseshoe", "rank_mask"):
        posterior = sp.fit(sp.bayesian_lora(tiny.causal_lm(), prior=name), task, rows, num_steps=3, **QUIET).posterior
        posterior.save_pretrained(tmp_path / name)
        loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / name)
        ours, theirs = posterior.log_weights(rows, num_draws=3), loaded.log_weights(rows, num_draws=3)
        np.testing.assert_array_equal(ours.log_prior, theirs.log_prior)
        np.testing.assert_array_equal(ours.log_q, theirs.log_q)
        drawn = loaded.sample(3).sites
        assert all(torch.equal(value, drawn[site]) for site, value in posterior.sample(3).sites.items())


@pytest.mark.parametrize("name", ["hierarchical", "horseshoe"])
def test_the_closed_form_kl_given_the_scales_is_unbiased(name):
    """Part of the KL in closed form, part by draws: the same expectation as all of it by draws."""
    blora, rows = two_layers(name, UNEQUAL)
    guide = as_guide("normal", blora, init_scale=0.3)
    assert isinstance(default_elbo(guide, blora.prior), TraceMeanField_ELBO)
    model, scoped = TaskModel(blora, LinearGaussian(), num_data=64), ScopedGuide(guide, draws="shared")
    batch = TrainingBatches(encode(rows, LinearGaussian().encode, need_target=True), 64, 0, seed=0)(0)
    found = []
    with torch.no_grad(), torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        torch.manual_seed(0)
        for elbo in (TraceMeanField_ELBO(), Trace_ELBO()):
            loss = elbo(model, scoped)
            values = torch.stack([loss(batch) for _ in range(300)])
            found.append((values.mean(), values.var() / len(values)))
    (a, va), (b, vb) = found
    assert abs(a - b) < 5 * (va + vb).sqrt()


# masks --------------------------------------------------------------------------------------------------------


def masked_toy():
    """Five directions of fixed factors, of which the truth leaves out two, and the exact probability of each."""
    toy = LinearToy(5, prior="rank_mask")
    truth = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = toy.features @ truth + NOISE * noise
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    log_joint = -0.5 * (y - masks @ toy.features.T).square().sum(1) / NOISE**2
    log_joint += (masks * math.log(0.9) + (1 - masks) * math.log(0.1)).sum(1)
    exact = log_joint.softmax(0) @ masks
    rows = [{**row, "y": value.item()} for row, value in zip(toy.rows, y, strict=True)]
    return toy, rows, truth, exact


def test_a_direction_that_only_harms_is_switched_off():
    toy, rows, truth, exact = masked_toy()
    posterior = sp.fit(toy.blora, toy.task, rows, num_steps=500, optimizer={"lr_loc": 0.1}, **QUIET).posterior
    assert ((exact - truth).abs() < 0.01).all()
    assert ((posterior.mean() - exact).abs() < 0.1).all()
    masks = posterior.sample(200).s
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert ((masks.mean(0) - posterior.mean()).abs() < 5 * 0.5 / 200**0.5).all()
    prediction = posterior.predict(rows, num_draws=50)
    np.testing.assert_allclose(prediction.means, posterior.sample(50).s @ toy.features.T, rtol=1e-6, atol=1e-6)


def test_masks_start_at_the_prior_and_their_kl_is_that_of_bernoullis():
    blora = sp.bayesian_lora(tiny.causal_lm(), prior=RankMaskPrior(0.8))
    guide = as_guide("normal", blora)
    assert isinstance(guide, RankMaskGuide) and isinstance(default_elbo(guide, blora.prior), TraceMeanField_ELBO)
    torch.testing.assert_close(guide.mean()["s"], torch.full((40,), 0.8))
    q = StraightThroughBernoulli(logits=torch.tensor([-1.0, 0.5]))
    p, prior = torch.sigmoid(torch.tensor([-1.0, 0.5])), torch.tensor([0.8, 0.8])
    by_hand = p * (p / prior).log() + (1 - p) * ((1 - p) / (1 - prior)).log()
    torch.testing.assert_close(torch.distributions.kl_divergence(q, dist.Bernoulli(prior)), by_hand)


def test_a_drawn_mask_is_zero_or_one_with_the_slope_of_the_trapezoid_rule():
    logits = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mask = StraightThroughBernoulli(logits=logits).rsample()
        torch.manual_seed(0)
        uniform = torch.rand(9, dtype=torch.float64)
    probs = torch.sigmoid(logits.detach())
    assert torch.equal(mask.detach(), (uniform > torch.sigmoid(-logits.detach())).double())
    expected = torch.where(mask.detach() == 1, 1 - probs, probs) / 2
    torch.testing.assert_close(torch.autograd.grad(mask.sum(), logits)[0], expected)


def test_the_gradient_of_a_quadratic_log_likelihood_of_masks_is_exact_on_average():
    """All 16 masks weighted by their probability, so nothing is left to chance."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([-2.0, -0.3, 0.8, 3.0], dtype=torch.float64, requires_grad=True)
    matrix, vector = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 4), (4,)))
    estimated, exact = torch.zeros(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for bits in itertools.product([0.0, 1.0], repeat=4):
        mask = torch.tensor(bits, dtype=torch.float64)
        drawn = drawn_as(mask, logits)
        assert torch.equal(drawn.detach(), mask)
        value = (vector - matrix @ drawn).square().sum()
        weight = dist.Bernoulli(logits=logits).log_prob(mask).sum().exp()
        estimated += weight.detach() * torch.autograd.grad(value, logits)[0]
        exact = exact + weight * value.detach()
    torch.testing.assert_close(estimated, torch.autograd.grad(exact, logits)[0])


def drawn_as(mask, logits):
    """The draw of a Bernoulli that turns out as ``mask``, with its gradient."""
    seeds = itertools.count()
    with torch.random.fork_rng():
        while True:
            torch.manual_seed(next(seeds))
            drawn = StraightThroughBernoulli(logits=logits).rsample()
            if torch.equal(drawn.detach(), mask):
                return drawn


def test_masks_are_drawn_with_their_probability():
    probs = torch.tensor([0.05, 0.5, 0.9])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        share = StraightThroughBernoulli(probs=probs).rsample((4000,)).mean(0)
    assert ((share - probs).abs() < 5 * (probs * (1 - probs) / 4000).sqrt()).all()


# a prior on the factors -----------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What an objective returns, nats per example."""

    loss: float
    nll: float
    kl: float


def step_with(gauge, factor_scale):
    """Loss, NLL, weighted KL and gradients of one step of 8 of 24 rows, with a fixed draw."""
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64), r=2, gauge=gauge)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    task, guide = sp.MultipleChoice(tiny.tokenizer()), as_guide("normal", blora)
    batch = TrainingBatches(encode(tiny.question_rows(8), task.encode, need_target=True), 8, 0, seed=0)(0)
    model = TaskModel(blora, task, num_data=24, draws="per_example", factor_scale=factor_scale)
    objective = Objective(TraceMeanField_ELBO(), model, ScopedGuide(guide, draws="per_example"))
    with torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        torch.manual_seed(0)
        terms = objective.accumulate(batch, 0.5, share=1.0)
    return Terms(*terms.tolist()), blora.adapter.factors()


@pytest.mark.parametrize("gauge", ["unit_rows", "free"])
def test_a_normal_prior_on_the_factors_adds_their_squares_to_the_loss(gauge):
    """|B|^2 / (2 sd^2) nats per data set, and |A|^2 / (2 sd^2) where the gauge leaves A its length."""
    sd = 0.4
    plain, before = step_with(gauge, None)
    terms, after = step_with(gauge, sd)
    carries = [pair if gauge == "free" else pair[1:] for pair in after]
    squares = sum(factor.square().sum().item() for pair in carries for factor in pair)
    assert terms.loss - plain.loss == pytest.approx(squares / (2 * sd**2) / 24, rel=1e-9)
    assert terms.nll == pytest.approx(plain.nll) and terms.kl == pytest.approx(plain.kl)
    for (A, B), (old_A, old_B) in zip(after, before, strict=True):
        torch.testing.assert_close(B.grad, old_B.grad + B.detach() / sd**2 / 24, rtol=1e-9, atol=1e-12)
        pull = A.detach() / sd**2 / 24 if gauge == "free" else 0.0
        torch.testing.assert_close(A.grad, old_A.grad + pull, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("guide", ["normal", "delta", "svgd"])
def test_a_tight_prior_keeps_the_factors_small_under_any_guide(guide, task):
    sizes = []
    for factor_scale in (None, 0.01):
        blora = sp.bayesian_lora(tiny.causal_lm())
        options = {"num_steps": 30, "lr": 1e-2, "optimizer": {"factor_scale": factor_scale}, **QUIET}
        posterior = sp.fit(blora, task, tiny.question_rows(16), guide=guide, **options).posterior
        sizes.append(sum(B.square().sum().item() for _, B in posterior.factors))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("factor_scale", [0, -1.0, math.nan])
def test_a_factor_scale_that_is_not_positive_is_named(factor_scale, blora, task):
    with pytest.raises(ValueError, match=f"factor_scale={factor_scale} must be positive"):
        sp.fit(blora, task, tiny.question_rows(8), optimizer={"factor_scale": factor_scale}, num_steps=1, **QUIET)


# prior predictive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [1.0, "hierarchical"])
def test_the_prior_predictive_is_the_llm_under_draws_of_the_prior(prior, task, unchanged_rng):
    rows = tiny.question_rows(5, num_choices=3)
    blora = sp.bayesian_lora(tiny.causal_lm(), prior=prior)
    posterior = sp.fit(blora, task, tiny.question_rows(16), num_steps=10, lr=1e-2, **QUIET).posterior
    found = posterior.prior_predictive(rows, num_draws=3, seed=7)
    with torch.no_grad(), torch.random.fork_rng(), pyro.settings.context(module_local_params=True):
        torch.manual_seed(7)
        draws = [posterior.prior() for _ in range(3)]
        for i, s in enumerate(draws):
            with posterior.adapter.bind(s, factors=posterior.llm().factors):
                for n, row in enumerate(rows):
                    ids = torch.tensor([task.encode(row).inputs["input_ids"]])
                    logits = posterior.adapter.module(ids).logits[0, -1, task.label_ids[:3]]
                    np.testing.assert_allclose(found.log_probs[i, n], logits.log_softmax(0), rtol=1e-4, atol=1e-5)
    again, other = (posterior.prior_predictive(rows, num_draws=3, seed=seed, batch_size=2) for seed in (7, 8))
    np.testing.assert_allclose(again.log_probs, found.log_probs, rtol=1e-4, atol=1e-5)
    assert not np.allclose(other.log_probs, found.log_probs)


def test_the_prior_predictive_of_numbers_spreads_as_the_prior():
    toy = LinearToy(3, num_data=8)
    found = posterior_of(toy).prior_predictive(toy.rows, num_draws=3000, seed=1)
    sd = (toy.features.square().sum(1) * 1.25**2).sqrt().numpy()
    assert (np.abs(found.means.mean(0)) < 5 * sd / 3000**0.5).all()
    assert (np.abs(found.means.std(0) / sd - 1) < 5 / 6000**0.5).all()


@pytest.mark.parametrize("num_draws", [0, -1])
def test_the_prior_predictive_needs_a_draw(num_draws):
    toy = LinearToy(3, num_data=8)
    with pytest.raises(ValueError, match=f"num_draws={num_draws}"):
        posterior_of(toy).prior_predictive(toy.rows, num_draws=num_draws)


# what is not a prior or guide ----------------------------------------------------------------------------------------


def program(base, body, **parts):
    """A prior or guide whose forward is ``body(self)``."""

    class Own(base):
        def forward(self, *args, **kwargs):
            return body(self)

        def mean(self):
            return {"s": self.loc}

    own = Own()
    for name, part in parts.items():
        setattr(own, name, part)
    return own


def own_prior(body):
    return program(Prior, body)


def own_guide(body):
    return program(Guide, body, loc=nn.Parameter(torch.ones(40)))


def normal(loc):
    return dist.Normal(loc, 0.1).to_event(1)


def start(prior=1.0, guide="normal", **options):
    """One step of training."""
    task, blora = sp.MultipleChoice(tiny.tokenizer()), sp.bayesian_lora(tiny.causal_lm(), prior=prior)
    return sp.fit(blora, task, tiny.question_rows(8), guide=guide, num_steps=1, **{**QUIET, **options})


ZERO = torch.zeros(40)
WRONG_PRIORS = {
    "no site s": (lambda p: pyro.sample("z", normal(ZERO)), r"The prior samples \['z'\], but not the site 's'"),
    "no site": (lambda p: ZERO, r"The prior samples \[\], but not the site 's'"),
    "too long": (lambda p: pyro.sample("s", normal(torch.zeros(41))), r"\(40,\) in the guide, \(41,\) in the prior"),
    "no event": (lambda p: pyro.sample("s", dist.Normal(ZERO, 1.0)), r"prior.*to_event\(1\)"),
    "returns nothing": (lambda p: [pyro.sample("s", normal(ZERO)), None][1], "return.* s"),
}
WRONG_GUIDES = {
    "misses s": (lambda g: g.loc, r"The guide does not sample \['s'\]: each latent .* needs a pyro.sample"),
    "another site": (lambda g: pyro.sample("z", normal(g.loc)), r"The guide does not sample \['s'\]"),
    "one more": (
        lambda g: [pyro.sample(name, normal(g.loc)) for name in "zs"][1],
        r"The guide samples \['z'\], which the prior lacks: rename them to one of \['s'\].*is_auxiliary",
    ),
    "too short": (lambda g: pyro.sample("s", normal(g.loc[:5])), r"\(5,\) in the guide, \(40,\) in the prior"),
    "no event": (lambda g: pyro.sample("s", dist.Normal(g.loc, 0.1)), r"guide.*to_event\(1\)"),
}


@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("case", WRONG_PRIORS)
def test_a_program_that_is_no_prior_of_s_is_explained(case, batch_size):
    body, message = WRONG_PRIORS[case]
    with pytest.raises(ValueError, match=message):
        start(prior=own_prior(body), batch_size=batch_size)


@pytest.mark.parametrize("case", WRONG_GUIDES)
def test_a_program_that_is_no_guide_of_s_is_explained(case):
    body, message = WRONG_GUIDES[case]
    with pytest.raises(ValueError, match=message):
        start(guide=own_guide(body))


def test_a_guide_with_less_than_the_latents_of_the_prior_is_told_which_are_missing():
    with pytest.raises(ValueError, match=r"does not sample \['global_scale', 'local_scale', 'slab_variance'\]"):
        start(prior="horseshoe", guide=own_guide(lambda g: pyro.sample("s", normal(g.loc))))


def test_a_guide_outside_of_the_support_is_told_the_support():
    with pytest.raises(ValueError, match=r"outside the support of its prior.*GreaterThan.*AutoGuide"):
        start(prior="lognormal", guide=own_guide(lambda g: pyro.sample("s", normal(-g.loc))))


def test_a_guide_without_a_mean_is_refused_before_it_is_trained():
    class NoMean(Guide):
        def forward(self, *args, **kwargs):
            return pyro.sample("s", normal(ZERO))

    steps = []
    with pytest.raises(NotImplementedError, match=r"NoMean must define mean\(\)"):
        start(guide=NoMean(), callbacks=[steps.append])
    assert steps == []


@pytest.mark.parametrize("name", ["gaussian", "mean-field"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f"prior='{name}' is unknown.*'horseshoe', 'laplace'.*'rank_mask'"):
        start(prior=name)
    with pytest.raises(ValueError, match=f"guide='{name}' is unknown.*'delta', 'flow'.*'normal'.*'svgd'"):
        start(guide=name)


def test_a_name_that_is_nearly_right_gets_the_right_one():
    with pytest.raises(ValueError, match="Did you mean 'horseshoe'"):
        start(prior="horse_shoe")
    with pytest.raises(ValueError, match="Did you mean 'lowrank'"):
        start(guide="low_rank")


NO_GUIDES = {"none": None, "number": 3, "word": lambda blora: "normal", "layer": nn.Linear(1, 1), "class": NormalGuide}


@pytest.mark.parametrize("guide", NO_GUIDES.values(), ids=NO_GUIDES)
def test_what_is_no_guide_is_refused_with_what_is_one(guide):
    with pytest.raises(
        TypeError, match=r"expected a name \('normal', .*'svgd'\), a class of pyro.infer.autoguide.*returns a Guide"
    ):
        start(guide=guide)


@pytest.mark.parametrize("guide", ["lowrank", "flow", "full_covariance", "layer_covariance", "svgd", "delta"])
def test_a_family_for_real_latents_is_refused_for_masks_and_positive_latents(guide):
    with pytest.raises(
        ValueError, match=f"guide='{guide}' needs latents on the real line; masks need guide='rank_mask'"
    ):
        start(prior="rank_mask", guide=guide)
    if guide != "delta":
        with pytest.raises(ValueError, match=rf"guide='{guide}' needs .* real line; .*GreaterThan.*: use 'normal'"):
            start(prior="lognormal", guide=guide)


def test_masks_and_particles_say_what_they_are_for():
    with pytest.raises(ValueError, match="guide='rank_mask' is for masks: use it with prior='rank_mask'"):
        start(guide="rank_mask")
    with pytest.raises(ValueError, match="guide='svgd' moves particles of s alone; this prior has other latents too"):
        start(prior="hierarchical", guide="svgd")
    with pytest.raises(ValueError, match="AutoLaplaceApproximation needs more than the prior"):
        start(guide=autoguide.AutoLaplaceApproximation)


# an AutoGuide that was built already --------------------------------------------------------------------------------


def built(auto_class):
    """An instance on the prior, as an AutoGuide of Pyro is built on a model."""
    return lambda blora: auto_class(blora.prior, init_loc_fn=blora.init_loc)


@pytest.mark.parametrize("as_instance", [True, False], ids=["instance", "callable"])
@pytest.mark.parametrize("prior", ["normal", "empirical", "hierarchical", "lognormal"])
@pytest.mark.parametrize("auto_class", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoDelta])
def test_an_autoguide_may_be_an_instance(auto_class, prior, as_instance, tmp_path):
    rows, task = tiny.question_rows(8), sp.MultipleChoice(tiny.tokenizer())
    blora = sp.bayesian_lora(tiny.causal_lm(), prior=prior)
    guide = built(auto_class)(blora) if as_instance else built(auto_class)
    posterior = sp.fit(blora, task, rows, guide=guide, num_steps=3, lr=1e-2, **QUIET).posterior
    by_class = sp.bayesian_lora(tiny.causal_lm(), prior=prior)
    options = {"guide": auto_class, "num_steps": 3, "lr": 1e-2, "init_scale": 0.1, **QUIET}  # Pyro's default scale
    if auto_class is not autoguide.AutoDelta:
        torch.testing.assert_close(posterior.mean(), sp.fit(by_class, task, rows, **options).posterior.mean())
    before = posterior.sample(3, seed=1)
    assert (before.log_q is None) is (auto_class is autoguide.AutoDelta)
    sp.fit(blora, task, rows, guide=guide, num_steps=3, lr=1e-2, **QUIET)  # trains an instance on, not its snapshot
    assert torch.equal(posterior.sample(3, seed=1).s, before.s)
    assert posterior.describe().startswith(auto_class.__name__)
    posterior.save_pretrained(tmp_path / "p")
    with pytest.raises(ValueError, match="guide="):
        sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p", guide=built(auto_class))
    assert torch.equal(loaded.sample(3, seed=1).s, before.s)


def test_the_snapshot_of_an_instance_holds_no_second_llm():
    blora = sp.bayesian_lora(tiny.causal_lm())
    own = as_guide(built(autoguide.AutoNormal)(blora), blora)
    assert own.snapshot().auto.init_loc_fn.__self__ is blora and own.auto.model is not None


def test_an_instance_on_something_else_than_the_prior_is_told_what_to_build():
    blora = sp.bayesian_lora(tiny.causal_lm())
    with pytest.raises(
        ValueError, match=r"AutoNormal was built on a model that needs arguments.*AutoNormal\(blora.prior\)"
    ):
        as_guide(autoguide.AutoNormal(lambda batch: blora(**batch)), blora)
    with pytest.raises(ValueError, match="AutoLaplaceApproximation needs more than the prior"):
        as_guide(autoguide.AutoLaplaceApproximation(blora.prior), blora)
    other = autoguide.AutoNormal(lambda: pyro.sample("z", normal(ZERO)))
    with pytest.raises(ValueError, match=r"The guide does not sample \['s'\]"):
        start(guide=other)
