"""Laplace, linearized prediction, NUTS, restarts, particles and their comparison: exact where the answer is known."""

import math
import sys
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from arviz_stats.base import array_stats
from gaussians import normal_guide, posterior_of, solve
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import minimize_scalar
from toys import NOISE, PRIOR_SCALE, LinearGaussian, LinearToy

import scalabl_pyro as sp
from scalabl_pyro._process.random_state import scoped_seed
from scalabl_pyro.data import collate, encode, evaluation_batches
from scalabl_pyro.guides import DeltaGuide, EmpiricalGuide, FlowGuide, MixtureGuide, NormalGuide, ParticleGuide
from scalabl_pyro.inference.evidence import scale_of_largest_evidence
from scalabl_pyro.inference.mcmc import _FullData
from scalabl_pyro.inference.recording_nuts import RecordingNUTS
from scalabl_pyro.model.derivatives import gauss_newton
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.model.log_likelihood import LogLikelihood
from scalabl_pyro.posterior.comparison import _warning
from scalabl_pyro.training.svgd import SteinObjective

QUIET = {"progress": False}


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# a tiny transformer in float64, and what is known of each task by hand --------------------------------------------


def softmax_curvature(task, outputs, example):
    p = outputs[: example.extras.get("num_choices", len(outputs))].softmax(0)
    full = torch.zeros(len(outputs), len(outputs), dtype=p.dtype)
    full[: len(p), : len(p)] = p.diag() - p.outer(p)
    return full


def noise_curvature(task, outputs, example):
    return torch.eye(1, dtype=outputs.dtype) / task.noise_scale.detach().double() ** 2


def choices():
    rows = [row for n in (2, 3, 4) for row in tiny.question_rows(3, num_choices=n, seed=n)]
    return tiny.causal_lm(dtype=torch.float64), sp.MultipleChoice(tiny.tokenizer()), rows, softmax_curvature


def topics():
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    return tiny.classifier(dtype=torch.float64), task, tiny.text_rows(7), softmax_curvature


def amounts():
    rows = [{**row, "label": row["label"] / 2} for row in tiny.text_rows(7)]
    task = sp.Regression(tiny.tokenizer(), noise_scale=0.4)
    return tiny.classifier(num_labels=1, dtype=torch.float64), task, rows, noise_curvature


def transformer(make):
    """A posterior with factors that matter, its rows, and the curvature of its task in the outputs."""
    llm, task, rows, curvature = make()
    blora = sp.bayesian_lora(llm, r=2, prior=dist.Normal(0.25, 0.75))
    with torch.no_grad():
        for i, (_, B) in enumerate(blora.adapter.factors()):
            B.copy_(0.3 * seeded(*B.shape, seed=i))
    loc = 1 + 0.3 * seeded(blora.subspace.dim)
    guide = NormalGuide(loc, torch.linspace(0.1, 0.3, len(loc), dtype=torch.float64))
    return sp.Posterior.capture(blora, task, guide, provenance={}), rows, curvature


def outputs_of(posterior, example):
    """The outputs of one row, alone in its batch, as a function of s."""
    llm, batch = posterior.llm(), collate([example], [0], posterior.task.pad_token_id)
    return lambda s: posterior.task.outputs(llm, batch, s)[0]


def brute_force(posterior, rows, curvature):
    """sum_n J_n' L_n J_n, row by row, with Jacobians of torch and L by hand."""
    s, total = posterior.mean(), 0.0
    for example in encode(rows, posterior.task.encode, need_target=True):
        f = outputs_of(posterior, example)
        J = torch.autograd.functional.jacobian(f, s)
        total = total + J.T @ curvature(posterior.task, f(s).detach(), example) @ J
    return total


@pytest.fixture(scope="module")
def questions():
    return transformer(choices)


# Laplace ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [choices, topics, amounts])
def test_the_curvature_is_that_of_brute_force_for_any_batch_size(make):
    posterior, rows, curvature = transformer(make)
    expected = brute_force(posterior, rows, curvature)
    examples = encode(rows, posterior.task.encode, need_target=True)
    assert torch.linalg.matrix_rank(expected) > 3
    for batch_size in (1, 4, 16):
        likelihood = LogLikelihood(posterior.llm(), posterior.task, examples, batch_size=batch_size)
        found = gauss_newton(likelihood, posterior.mean())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_laplace_is_the_normal_with_that_curvature_and_its_evidence_follows_the_formula(questions, unchanged_rng):
    posterior, rows, curvature = questions
    new = sp.laplace(posterior, rows, batch_size=4)
    mode, dim = posterior.mean(), posterior.subspace.dim
    precision = brute_force(posterior, rows, curvature) + torch.eye(dim, dtype=torch.float64) / 0.75**2
    torch.testing.assert_close(new.mean(), mode, rtol=0, atol=0)
    torch.testing.assert_close(new.guide.covariance(), torch.linalg.inv(precision), rtol=1e-8, atol=1e-10)
    log_joint = posterior.predict(rows, num_draws=0).log_likelihood.sum()
    log_joint += dist.Normal(torch.full_like(mode, 0.25), 0.75).log_prob(mode).sum().item()
    evidence = log_joint + dim / 2 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision).item()
    assert new.provenance["laplace_log_evidence"] == pytest.approx(evidence, rel=1e-9)
    assert new.provenance["method"] == "Laplace"
    assert new.factors is posterior.factors and isinstance(posterior.guide, NormalGuide)  # the old one is as it was


def test_one_newton_step_finds_the_posterior_of_a_linear_model_from_anywhere(toy, exact):
    start = posterior_of(toy, DeltaGuide(exact.mean + 10))
    new = sp.laplace(start, toy.rows, newton_steps=1, batch_size=5)
    torch.testing.assert_close(new.mean(), exact.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new.guide.covariance(), exact.covariance, rtol=1e-9, atol=1e-12)
    assert new.provenance["laplace_log_evidence"] == pytest.approx(exact.evidence, rel=1e-9)


def test_newton_steps_climb_to_the_mode_of_a_transformer(questions):
    """Always upwards; the Gauss-Newton matrix is not the Hessian, so that the error falls by a factor per step."""
    posterior, rows, _ = questions
    examples = encode(rows, posterior.task.encode, need_target=True)
    likelihood = LogLikelihood(posterior.llm(), posterior.task, examples)
    heights = []
    for newton_steps in (0, 1, 2, 4, 8, 40):
        mode = sp.laplace(posterior, rows, newton_steps=newton_steps).mean()
        fit, slope = likelihood.with_gradient(mode)
        heights.append((fit - 0.5 * ((mode - 0.25) / 0.75).square().sum()).item())
    assert heights == sorted(set(heights))
    assert (slope - (mode - 0.25) / 0.75**2).abs().max() < 1e-4


def test_the_learned_scale_of_a_prior_is_a_normal_one_too():
    toy = LinearToy(3, prior="empirical")
    posterior = posterior_of(toy, DeltaGuide(torch.zeros(3, dtype=torch.float64)))
    posterior.prior.scale = torch.tensor([0.2], dtype=torch.float64)
    expected = solve(toy.features, toy.y, 0.2)
    new = sp.laplace(posterior, toy.rows, newton_steps=1)
    torch.testing.assert_close(new.guide.covariance(), expected.covariance, rtol=1e-9, atol=1e-12)
    assert new.provenance["laplace_log_evidence"] == pytest.approx(expected.evidence, rel=1e-9)


def test_another_prior_scale_gives_another_prior_and_its_posterior(toy):
    new = sp.laplace(posterior_of(toy), toy.rows, prior_scale=0.2, newton_steps=1)
    expected = solve(toy.features, toy.y, 0.2)
    torch.testing.assert_close(new.mean(), expected.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new.guide.covariance(), expected.covariance, rtol=1e-9, atol=1e-12)
    assert new.prior.distribution().stddev.unique().tolist() == [0.2] and new.provenance["prior_scale"] == 0.2


@pytest.mark.parametrize("prior", [PRIOR_SCALE, dist.Normal(0.5, 1.0)], ids=["centered", "off center"])
def test_the_evidence_chooses_the_scale_that_maximizes_it(toy, exact, prior):
    """At a fixed mode; the new prior is centered at 0, and so must be the evidence that it is chosen by."""
    mode = exact.mean + 0.3
    new = sp.laplace(posterior_of(toy, DeltaGuide(mode), prior=prior), toy.rows, prior_scale="evidence")
    toy.blora.prior = sp.priors.as_prior(PRIOR_SCALE, toy.blora.subspace).double()
    curvature = toy.features.T @ toy.features / NOISE**2
    fit = dist.Normal(toy.features @ mode, torch.tensor(NOISE).double()).log_prob(toy.y).sum()

    def loss(log_scale):
        scale = math.exp(log_scale)
        prior = dist.Normal(torch.zeros_like(mode), scale).log_prob(mode).sum() + 1.5 * math.log(2 * math.pi)
        return -(fit + prior - 0.5 * torch.logdet(curvature + torch.eye(3) / scale**2)).item()

    best = minimize_scalar(loss, bounds=(-7, 7), method="bounded", options={"xatol": 1e-8})
    assert new.provenance["prior_scale"] == pytest.approx(math.exp(best.x), rel=0.01)  # it looks on a grid
    assert new.provenance["laplace_log_evidence"] == pytest.approx(-best.fun, rel=1e-4)
    assert new.prior.distribution().mean.unique().tolist() == [0.0]


def test_a_laplace_posterior_is_saved_and_loaded(fitted, tmp_path):
    rows = tiny.question_rows(48)
    new = sp.laplace(fitted.posterior, rows, prior_scale="evidence")
    new.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    assert loaded.provenance == new.provenance
    assert torch.equal(loaded.sample(5, seed=1).s, new.sample(5, seed=1).s)


@pytest.mark.parametrize(
    ("prior", "options", "message"),
    [
        (1.0, {"prior_scale": "evidnce"}, r"prior_scale='evidnce': give a number, 'evidence', or None"),
        (1.0, {"prior_scale": 0.0}, "prior_scale=0.0 must be positive and finite"),
        (1.0, {"prior_scale": math.inf}, "prior_scale=inf must be positive and finite"),
        (dist.Laplace(0.0, 1.0), {}, r"Laplace\(loc, scale\)\) is not normal: pass prior_scale="),
        ("horseshoe", {}, r"HorseshoePrior\(\) is not normal: pass prior_scale="),
        ("rank_mask", {}, r"RankMaskPrior\(\) is not normal"),
        (dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), {}, "factorized normal"),
        (1.0, {"prior_scale": [1.0]}, r"prior_scale=\[1.0\]: give a number, 'evidence', or None"),
        (1.0, {"prior_scale": True}, "prior_scale=True must be positive and finite"),
        (1.0, {"batch_size": 0}, r"^batch_size=0 must be a whole number, 1 or more\.$"),
        (1.0, {"newton_steps": -1}, r"^newton_steps=-1 must be a whole number, 0 or more\.$"),
        (1.0, {"newton_steps": 1.5}, r"^newton_steps=1.5 must be a whole number, 0 or more\.$"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_laplace_cannot_do_is_explained(prior, options, message):
    toy = LinearToy(3, num_data=6, prior=prior)
    with pytest.raises(ValueError, match=message):
        sp.laplace(posterior_of(toy, DeltaGuide(torch.ones(3, dtype=torch.float64))), toy.rows, **options)


class AbsoluteError(LinearGaussian):
    """A likelihood whose logarithm is piecewise linear, so that its curvature is zero."""

    def likelihood(self, outputs, batch):
        return dist.Laplace(outputs[..., 0], 1.0)


def test_a_likelihood_without_curvature_is_refused_instead_of_giving_back_the_prior(toy, exact):
    posterior = replace(posterior_of(toy, DeltaGuide(exact.mean)), task=AbsoluteError())
    with pytest.raises(ValueError, match=r"AbsoluteError.*curvature"):
        sp.laplace(posterior, toy.rows)


# linearized prediction ------------------------------------------------------------------------------------------


def test_a_linear_model_is_predicted_as_it_is(toy, exact):
    """Means are F mean + root(f' V f) z with z standard normal, the same z for any V; draw i is one s for all rows."""
    f, num_draws = toy.features, 1000
    spread = ((f @ exact.covariance) * f).sum(1).sqrt().numpy()
    prediction = posterior_of(toy).predict_linearized(toy.rows, num_draws=num_draws, seed=1)
    z = (prediction.means - (f @ exact.mean).numpy()) / spread
    assert (abs(z.mean(0)) < 5 / num_draws**0.5).all() and (abs(z.var(0) - 1) < 5 * (2 / num_draws) ** 0.5).all()
    own = posterior_of(toy).predict(toy.rows, num_draws=num_draws, seed=1)
    np.testing.assert_allclose(prediction.means, own.means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(prediction.log_likelihood, own.log_likelihood, rtol=1e-9, atol=1e-9)
    wider = posterior_of(toy, normal_guide(exact.mean, 9 * exact.covariance))
    wide = wider.predict_linearized(toy.rows, num_draws=num_draws, seed=1)
    np.testing.assert_allclose((wide.means - (f @ exact.mean).numpy()) / spread, 3 * z, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(prediction.variances, NOISE**2)


def test_the_logits_of_a_transformer_vary_as_their_jacobians_say(questions):
    posterior, rows, _ = questions
    num_draws = 4000
    prediction = posterior.predict_linearized(rows, num_draws=num_draws, seed=2)
    V = posterior.guide.covariance().detach()
    for i, example in enumerate(encode(rows, posterior.task.encode, need_target=True)):
        f, k = outputs_of(posterior, example), example.extras["num_choices"]
        J = torch.autograd.functional.jacobian(f, posterior.mean())[:k]
        contrast = J[1:] - J[:1]
        expected = (contrast @ V @ contrast.T).numpy()
        logits = prediction.log_probs[:, i, 1:k] - prediction.log_probs[:, i, :1]
        center = (f(posterior.mean())[1:k] - f(posterior.mean())[0]).detach().numpy()
        sd = expected.diagonal() ** 0.5
        assert (np.abs(logits.mean(0) - center) < 5 * sd / num_draws**0.5).all()
        error = np.sqrt((np.outer(sd, sd) ** 2 + expected**2) / num_draws)
        assert (np.abs(np.atleast_2d(np.cov(logits.T)) - expected) < 5 * error).all()
        assert np.isneginf(prediction.log_probs[:, i, k:]).all()


def test_without_spread_it_is_the_prediction_at_the_mean(questions):
    posterior, rows, _ = questions
    still = replace(posterior, guide=NormalGuide(posterior.mean(), torch.full_like(posterior.mean(), 1e-12)))
    linearized = still.predict_linearized(rows, num_draws=2).log_probs
    np.testing.assert_allclose(linearized, np.repeat(still.predict(rows, num_draws=0).log_probs, 2, 0), atol=1e-6)


def test_a_row_is_predicted_alike_in_any_batch(questions, unchanged_rng):
    posterior, rows, _ = questions
    one, all_ = (posterior.predict_linearized(rows, num_draws=3, batch_size=size).log_probs for size in (1, 16))
    np.testing.assert_allclose(one, all_, rtol=1e-6, atol=1e-6)


def test_linearized_prediction_needs_a_normal_guide_and_draws(questions, toy, exact):
    posterior, rows, _ = questions
    flow = replace(posterior, guide=FlowGuide(posterior.mean(), torch.ones_like(posterior.mean())))
    with pytest.raises(TypeError, match=r"FlowGuide is not a normal family"):
        flow.predict_linearized(rows)
    with pytest.raises(TypeError, match=r"DeltaGuide.*laplace\(\)"):
        posterior_of(toy, DeltaGuide(exact.mean)).predict_linearized(toy.rows)
    for num_draws in (0, -1):
        with pytest.raises(ValueError, match=f"num_draws={num_draws}"):
            posterior.predict_linearized(rows, num_draws=num_draws)


# NUTS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chains(toy):
    return sp.mcmc(posterior_of(toy), toy.rows, num_samples=250, warmup_steps=150, num_chains=2, seed=4, **QUIET)


def test_nuts_sees_the_joint_density_of_the_whole_data_set(toy):
    posterior, s = posterior_of(toy), seeded(3)
    examples = encode(toy.rows, toy.task.encode, need_target=True)
    values = []
    for batch_size in (7, 64):
        program = _FullData(posterior.prior, LogLikelihood(posterior.llm(), toy.task, examples, batch_size=batch_size))
        point = s.clone().requires_grad_(True)
        with pyro.settings.context(module_local_params=True):
            density = poutine.trace(poutine.condition(program, data={"s": point})).get_trace().log_prob_sum()
        values.append((density.item(), torch.autograd.grad(density, point)[0]))
    noise, prior = torch.tensor([NOISE, PRIOR_SCALE]).double()
    by_hand = dist.Normal(toy.features @ s, noise).log_prob(toy.y).sum() + dist.Normal(s * 0, prior).log_prob(s).sum()
    slope = toy.features.T @ (toy.y - toy.features @ s) / NOISE**2 - s / PRIOR_SCALE**2
    for value, gradient in values:
        assert value == pytest.approx(by_hand.item(), rel=1e-10)
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-10)


def test_nuts_finds_the_exact_posterior(chains, exact):
    s = chains.guide.points("s").reshape(2, 250, 3).numpy()
    for d in range(3):
        ess, sd = float(array_stats.ess(s[..., d])), exact.covariance[d, d].sqrt().item()
        assert abs(s[..., d].mean() - exact.mean[d].item()) < 5 * sd / ess**0.5
        assert abs(s[..., d].var() / sd**2 - 1) < 5 * (2 / ess) ** 0.5
    correlation = np.corrcoef(s.reshape(-1, 3).T)[0, 1]
    expected = (exact.covariance[0, 1] / (exact.covariance[0, 0] * exact.covariance[1, 1]).sqrt()).item()
    assert abs(correlation - expected) < 5 * (1 - expected**2) / ess**0.5


def test_what_the_chains_say_of_themselves(chains, toy):
    assert chains.provenance["method"] == "NUTS" and chains.provenance["num_steps"] == 250
    assert chains.provenance["divergences"] == 0
    s = chains.guide.points("s").reshape(2, 250, 3).numpy()
    assert chains.provenance["r_hat"] == max(float(array_stats.rhat(s[..., d])) for d in range(3)) < 1.1
    assert chains.provenance["ess"] == min(float(array_stats.ess(s[..., d])) for d in range(3)) > 50
    report = chains.diagnose(toy.rows).to_frame()
    assert report.loc["r_hat", "value"] == pytest.approx(chains.provenance["r_hat"])
    assert "pareto_k" not in report.index


def test_arviz_gets_the_chains_and_a_posterior_each_draw_once(chains):
    assert dict(chains.to_arviz()["posterior"].sizes)["chain"] == 2
    assert chains.to_arviz()["posterior"]["s"].shape == (2, 250, 1, 3)
    drawn, points = chains.sample(500).s, chains.guide.points("s")
    assert torch.equal(drawn.sort(0).values, points.sort(0).values) and not torch.equal(drawn, points)


def test_arviz_gets_the_statistics_of_each_transition(chains, toy):
    idata = chains.to_arviz()
    stats, s = idata["sample_stats"], idata["posterior"]["s"].values.reshape(2, 250, 3)
    kinds = {name: variable.dtype.kind for name, variable in stats.data_vars.items()}
    names = {"lp": "f", "energy": "f", "acceptance_rate": "f", "step_size": "f", "tree_depth": "i", "n_steps": "i"}
    assert kinds == {**names, "diverging": "b"}
    # Of a draw with an unbounded prior, lp is the joint density, exactly; the kinetic energy is positive.
    prior = dist.Normal(0.0, torch.tensor(PRIOR_SCALE).double())
    joint = torch.as_tensor(s) @ toy.features.T
    joint = dist.Normal(joint, NOISE).log_prob(toy.y).sum(-1) + prior.log_prob(torch.as_tensor(s)).sum(-1)
    np.testing.assert_allclose(stats["lp"].values, joint.numpy(), rtol=1e-6)
    assert (stats["energy"].values + stats["lp"].values > 0).all()
    kinetic = stats["energy"].values + stats["lp"].values  # half a chi-squared of three degrees of freedom
    assert kinetic.mean() == pytest.approx(1.5, abs=5 * math.sqrt(1.5 / kinetic.size))
    assert not stats["diverging"].values.any() and (stats["step_size"].values > 0).all()
    assert ((stats["acceptance_rate"].values > 0) & (stats["acceptance_rate"].values <= 1)).all()
    assert abs(stats["acceptance_rate"].values.mean() - 0.8) < 0.15  # what the step size was adapted to
    steps, depth = stats["n_steps"].values, stats["tree_depth"].values
    assert (steps < 2**depth).all() and (steps >= 1).all()
    assert (stats["step_size"].values == stats["step_size"].values[:, :1]).all()


def test_the_record_changes_no_draw_of_pyros_sampler():
    def draws(kind):
        with pyro.settings.context(module_local_params=True), scoped_seed(3):
            kernel = kind(potential_fn=lambda z: 0.5 * (z["s"] ** 2).sum(), max_tree_depth=4)
            sampler = MCMC(kernel, 20, warmup_steps=10, initial_params={"s": torch.ones(2)}, disable_progbar=True)
            sampler.run()
            return sampler.get_samples()["s"], kernel

    (recorded, kernel), (plain, _) = draws(RecordingNUTS), draws(NUTS)
    assert torch.equal(recorded, plain)
    assert kernel.statistics()["lp"].numpy() == pytest.approx(-0.5 * recorded.double().square().sum(1).numpy())


def test_divergences_are_counted_and_marked():
    """A funnel with a step size that is far too large for its neck."""

    def potential(z):
        return 0.5 * (z["v"] ** 2 / 9 + (z["x"] ** 2 * (-z["v"]).exp()).sum() + 9 * z["v"]).sum()

    with scoped_seed(0):
        kernel = RecordingNUTS(potential_fn=potential, step_size=2.0, adapt_step_size=False, max_tree_depth=5)
        start = {"v": torch.full((1,), -2.0), "x": torch.full((9,), 0.1)}
        sampler = MCMC(kernel, 60, warmup_steps=1, initial_params=start, disable_progbar=True)
        sampler.run()
    marked = kernel.statistics()["diverging"].nonzero()[:, 0].tolist()
    assert marked == sampler.diagnostics()["divergences"]["chain 0"] and marked


def test_chains_are_saved_and_loaded(fitted, tmp_path):
    options = {"num_samples": 4, "warmup_steps": 1, "max_tree_depth": 2, "batch_size": 48, **QUIET}
    new = sp.mcmc(fitted.posterior, tiny.question_rows(48), **options)
    new.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    assert loaded.guide.num_chains == 2 and torch.equal(loaded.guide.points("s"), new.guide.points("s"))
    saved, read = new.guide.statistics(), loaded.guide.statistics()
    assert saved.keys() == read.keys() and all(torch.equal(saved[name], read[name]) for name in saved)
    assert loaded.provenance == new.provenance
    rows = tiny.question_rows(5)
    np.testing.assert_array_equal(loaded.predict(rows).log_probs, new.predict(rows).log_probs)


def test_the_seed_decides_and_the_batch_size_does_not(toy, unchanged_rng, monkeypatch):
    module, hidden = (
        sys.modules["scalabl_pyro.inference.mcmc"],
        [],
    )  # whether Pyro's bar is; stderr depends on what ran before
    MCMC = module.MCMC

    def watched(*args, **kwargs):
        hidden.append(kwargs["disable_progbar"])
        return MCMC(*args, **kwargs)

    monkeypatch.setattr(module, "MCMC", watched)
    posterior, options = posterior_of(toy), {"num_samples": 5, "warmup_steps": 5, "num_chains": 2}
    first, again, batched, other = (
        sp.mcmc(posterior, toy.rows, **options, **QUIET, **more).guide.points("s")
        for more in ({}, {}, {"batch_size": 9}, {"seed": 7})
    )
    assert torch.equal(first, again)
    torch.testing.assert_close(batched, first, rtol=1e-6, atol=1e-6)
    assert not torch.equal(other, first) and not torch.equal(first[:5], first[5:])
    assert hidden == [True] * 8
    sp.mcmc(posterior, toy.rows, **options)
    assert hidden[8:] == [False] * 2


def test_scales_of_the_prior_are_sampled_with_s():
    toy = LinearToy(2, num_data=16, prior="hierarchical")
    guide = sp.guides.as_guide("normal", toy.blora)
    new = sp.mcmc(posterior_of(toy, guide), toy.rows, num_samples=20, warmup_steps=20, **QUIET)
    scales = new.guide.points("layer_scale")
    assert scales.shape == (40, 1) and (scales > 0).all() and len(scales.unique()) > 20
    assert set(new.to_arviz()["posterior"].data_vars) == {"s", "layer_scale"}


@pytest.mark.parametrize(
    ("prior", "options", "message"),
    [
        (1.0, {"num_samples": 2}, r"^num_samples=2 must be a whole number, 4 or more\.$"),
        (1.0, {"num_samples": 3}, r"^num_samples=3 must be a whole number, 4 or more\.$"),
        (1.0, {"num_samples": True}, r"^num_samples=True must be a whole number, 4 or more\.$"),
        (1.0, {"num_samples": 10.5}, r"^num_samples=10.5 must be a whole number, 4 or more\.$"),
        (1.0, {"num_chains": 0}, r"^num_chains=0 must be a whole number, 1 or more\.$"),
        (1.0, {"warmup_steps": 0}, r"^warmup_steps=0 must be a whole number, 1 or more\.$"),
        (1.0, {"batch_size": 0}, r"^batch_size=0 must be a whole number, 1 or more\.$"),
        (1.0, {"batch_size": "8"}, r"^batch_size='8' must be a whole number, 1 or more\.$"),
        (1.0, {"max_tree_depth": None}, r"^max_tree_depth=None must be a whole number, 1 or more\.$"),
        (1.0, {"target_accept": 1.5}, r"target_accept=1.5.*between 0 and 1"),
        (1.0, {"target_accept": math.nan}, r"target_accept=nan.*between 0 and 1"),
        (1.0, {"target_accept": "0.8"}, r"target_accept='0.8'.*between 0 and 1"),
        (1.0, {"jitter": -1}, r"^jitter=-1 must be a finite number, 0 or more\.$"),
        (1.0, {"jitter": math.nan}, r"^jitter=nan must be a finite number, 0 or more\.$"),
        ("rank_mask", {}, "discrete"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_nuts_cannot_do_is_explained(prior, options, message):
    toy = LinearToy(2, num_data=6, prior=prior)
    posterior = posterior_of(toy, sp.guides.as_guide("normal", toy.blora))
    with pytest.raises(ValueError, match=message):
        sp.mcmc(posterior, toy.rows, **{"num_samples": 4, "warmup_steps": 1, **QUIET, **options})


def test_nuts_refuses_batches(toy):
    examples = encode(toy.rows, toy.task.encode, need_target=True)
    with pytest.raises(ValueError, match="data yields batches, but NUTS needs the density of the whole data set"):
        sp.mcmc(posterior_of(toy), list(evaluation_batches(examples, 8, 0)))


# restarts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def restarts(toy, exact):
    middle = posterior_of(toy, DeltaGuide(exact.mean))
    options = {
        "num_steps": 600,
        "batch_size": 64,
        "optimizer": {"lr_loc": 0.05, "lr_scale": 0.05},
        "draws": "per_example",
        **QUIET,
    }
    return sp.ensemble(middle, toy.rows, guide="full_covariance", num_members=3, spread=2.0, seed=5, **options)


def test_restarts_from_elsewhere_reach_the_same_posterior(restarts, toy, exact):
    members = restarts.guide.component_list()
    for member in members:
        assert ((member.mean()["s"] - exact.mean).abs() / exact.covariance.diagonal().sqrt()).max() < 0.15
        torch.testing.assert_close(member.covariance(), exact.covariance, rtol=0.2, atol=0.002)
    assert len({tuple(member.mean()["s"].tolist()) for member in members}) == 3
    assert restarts.diagnose(toy.rows).to_frame().loc["r_hat", "severity"] == "ok"
    assert restarts.provenance["members"] == 3


def test_the_mixture_weighs_its_members_alike(exact):
    locs = torch.stack([exact.mean, exact.mean + 3])
    guide = MixtureGuide([normal_guide(loc, exact.covariance) for loc in locs])
    toy = LinearToy(3, num_data=6)
    draws = posterior_of(toy, guide).sample(2000, seed=0)
    members = dist.MultivariateNormal(locs, exact.covariance)
    by_hand = members.log_prob(draws.s.unsqueeze(1)).logsumexp(1) - math.log(2)
    torch.testing.assert_close(draws.log_q, by_hand, rtol=1e-9, atol=1e-9)
    nearer_second = ((draws.s - locs[1]).norm(dim=1) < (draws.s - locs[0]).norm(dim=1)).double().mean()
    assert abs(nearer_second - 0.5) < 5 * 0.5 / 2000**0.5
    torch.testing.assert_close(posterior_of(toy, guide).mean(), locs.mean(0))


def test_a_mixture_gives_the_density_of_values_that_it_did_not_draw(exact):
    guide = MixtureGuide([normal_guide(exact.mean + shift, exact.covariance) for shift in (0, 3)])
    values = seeded(5, 3)
    members = dist.MultivariateNormal(torch.stack([exact.mean, exact.mean + 3]), exact.covariance)
    by_hand = members.log_prob(values.unsqueeze(1)).logsumexp(1) - math.log(2)
    torch.testing.assert_close(guide.log_prob({"s": values}), by_hand, rtol=1e-9, atol=1e-9)


def test_autoguides_know_the_density_of_their_own_draws_alone():
    blora = sp.bayesian_lora(tiny.causal_lm())
    guide = sp.guides.as_guide(AutoNormal, blora)
    sites, log_q = guide.sample_and_log_prob(3, seed=0)
    assert log_q.isfinite().all()
    with pytest.raises(TypeError, match=r"AutoFamily samples auxiliary sites.*sample_and_log_prob"):
        guide.log_prob(sites)
    mixture = MixtureGuide([guide, sp.guides.as_guide("normal", blora)])  # -inf would be the wrong density
    assert mixture.sample_and_log_prob(3, seed=0)[1] is None


class WithoutExtras(sp.guides.Guide):
    """A guide of a user, with the two methods that it must have."""

    def __init__(self, loc):
        super().__init__()
        self.loc = torch.nn.Parameter(loc.clone())

    def forward(self, *args, **kwargs):
        return pyro.sample("s", dist.Normal(self.loc, 0.5).to_event(1))

    def mean(self):
        return {"s": self.loc}


def test_a_guide_of_ones_own_has_defaults_for_all_else(exact, unchanged_rng):
    guide, twin = WithoutExtras(exact.mean), NormalGuide(exact.mean, torch.full_like(exact.mean, 0.5))
    sites, log_q = guide.sample_and_log_prob(4, seed=3)
    expected, expected_log_q = twin.sample_and_log_prob(4, seed=3)
    assert torch.equal(sites["s"], expected["s"]) and torch.equal(log_q, expected_log_q)
    assert torch.equal(guide.sample(2, seed=3)["s"], sites["s"][:2])
    torch.testing.assert_close(guide.log_prob(sites), log_q)
    assert guide.location() is guide.loc and guide.method == "SVI"
    assert guide.chains() is None and guide.component_list() == []
    for num_draws in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"num_draws={num_draws} must be a whole number, 1 or more"):
            guide.sample(num_draws, seed=0)


def test_a_point_has_no_density_to_ask_for(exact):
    with pytest.raises(TypeError, match="DeltaGuide has no density"):
        DeltaGuide(exact.mean).log_prob({"s": exact.mean[None]})


@pytest.mark.parametrize("spread", [0.01, 1.0, 40.0])
def test_the_evidence_is_that_of_the_linear_model_on_the_whole_grid(spread):
    eigenvalues, weights = torch.tensor([3.0, 0.5, 0.0, -1e-9]).double(), spread * seeded(4)
    found = scale_of_largest_evidence(eigenvalues, float(weights.square().sum()), num_scales=601)
    grid = np.exp(np.linspace(math.log(1e-3), math.log(1e3), 601))
    h = eigenvalues.clamp_min(0).numpy()
    evidence = [
        -4 * math.log(c) - 0.5 * float(weights.square().sum()) / c**2 - 0.5 * np.log(h + c**-2).sum() for c in grid
    ]
    assert found == grid[np.argmax(evidence)]


def test_an_evidence_without_a_maximum_is_warned_of(caplog):
    assert scale_of_largest_evidence(torch.zeros(3), 1.0) == pytest.approx(1e3)
    assert "the evidence chose the prior scale 1e+03, an end of its range" in caplog.text


def test_a_mixture_of_points_has_no_density(toy, exact):
    posterior = posterior_of(toy, MixtureGuide([DeltaGuide(exact.mean), DeltaGuide(exact.mean + 1)]))
    assert posterior.sample(4).log_q is None


def test_an_ensemble_holds_the_factors_and_is_saved_and_loaded(fitted, tmp_path, unchanged_rng):
    rows = tiny.question_rows(48)
    new = sp.ensemble(fitted.posterior, rows, num_members=2, num_steps=2, **QUIET)
    assert new.factors is fitted.posterior.factors
    new.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    assert torch.equal(loaded.sample(6, seed=1).s, new.sample(6, seed=1).s)
    again = sp.ensemble(fitted.posterior, rows, num_members=2, num_steps=2, **QUIET)
    assert torch.equal(again.sample(6).s, new.sample(6).s)


def test_an_ensemble_works_beside_scales_of_the_prior():
    toy = LinearToy(2, num_data=16, prior="hierarchical")
    posterior = posterior_of(toy, sp.guides.as_guide("normal", toy.blora))
    new = sp.ensemble(posterior, toy.rows, num_members=2, num_steps=2, **QUIET)
    assert set(new.sample(3).sites) == {"s", "layer_scale"}


def test_the_prior_of_an_ensemble_is_the_one_its_members_were_fitted_under(toy, exact):
    """Another prior on the way to the members would leave a mixture that no density is right for."""
    middle = posterior_of(toy, DeltaGuide(exact.mean))
    try:
        new = sp.ensemble(middle, toy.rows, num_steps=1, prior=0.1, **QUIET)
    except (TypeError, ValueError) as error:
        assert "prior" in str(error)
    else:
        assert new.prior.distribution().stddev.unique().item() == pytest.approx(0.1)


def test_a_guide_given_as_it_is_stays_as_it_is_and_members_differ(toy, exact):
    guide = normal_guide(exact.mean, exact.covariance)
    new = sp.ensemble(posterior_of(toy), toy.rows, guide=guide, num_members=2, num_steps=1, **QUIET)
    assert torch.equal(guide.loc, exact.mean)
    first, second = new.guide.component_list()
    assert not torch.equal(first.loc, second.loc)


def test_members_share_the_prior_that_the_first_one_learned():
    toy = LinearToy(2, num_data=16, prior="empirical")
    posterior = posterior_of(toy, DeltaGuide(torch.ones(2, dtype=torch.float64)))
    before = posterior.prior.scale.clone()
    first, both = (
        sp.ensemble(posterior, toy.rows, num_members=n, num_steps=3, lr=0.1, **QUIET).prior.scale for n in (2, 3)
    )
    assert torch.equal(first, both) and not torch.equal(first, before)
    assert torch.equal(posterior.prior.scale, before)


def test_an_ensemble_explains_what_it_cannot_do(toy, exact):
    middle = posterior_of(toy, DeltaGuide(exact.mean))
    for num_members in (1, 2.5, True):
        with pytest.raises(ValueError, match=f"num_members={num_members} must be a whole number, 2 or more"):
            sp.ensemble(middle, toy.rows, num_members=num_members)
    for spread in (-1.0, math.nan, "wide"):
        with pytest.raises(ValueError, match=f"spread={spread!r} must be a finite number, 0 or more"):
            sp.ensemble(middle, toy.rows, spread=spread)
    with pytest.raises(TypeError, match=r"ParticleGuide has no parameter 'loc'.*use 'normal', 'layer_covariance'"):
        sp.ensemble(middle, toy.rows, guide="svgd", **QUIET)


# particles ----------------------------------------------------------------------------------------------------


def stein_by_hand(points, scores):
    """Liu and Wang (2016), equation 8, term by term."""
    count = len(points)
    squares = [((a - b) ** 2).sum() for a in points for b in points if a is not b]
    h = sorted(squares)[(len(squares) - 1) // 2] / math.log(count + 1)
    direction = np.zeros_like(points)
    for i in range(count):
        for j in range(count):
            k = math.exp(-((points[j] - points[i]) ** 2).sum() / h)
            direction[i] += k * scores[j] + k * 2 / h * (points[i] - points[j])
    return direction / count


@pytest.mark.parametrize("num_particles", [2, 3, 5])
def test_the_stein_direction_is_that_of_the_formula(num_particles):
    guide = ParticleGuide(torch.zeros(2).double(), torch.ones(2).double(), num_particles=num_particles)
    score = seeded(num_particles, 2, seed=1)
    points = list(guide.particles.detach().numpy())
    np.testing.assert_allclose(
        guide.stein_gradient(score).numpy(), stein_by_hand(points, score.numpy()), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kl_weight", [1.0, 0.25])
def test_a_step_moves_the_particles_by_the_joint_density_of_the_whole_data_set(toy, kl_weight):
    """A batch of 16 of the 64 rows counts four times; the optimizer sees the gradient of nats per example."""
    guide = ParticleGuide(torch.zeros(3).double(), torch.ones(3).double(), num_particles=4)
    model = TaskModel(posterior_of(toy).blora(), toy.task, num_data=64)
    examples = encode(toy.rows[:16], toy.task.encode, need_target=True)
    objective = SteinObjective(model, guide)
    with pyro.settings.context(module_local_params=True):
        for half in evaluation_batches(examples, 8, 0):
            objective.accumulate(half, kl_weight, share=0.5)
        objective.finish()
    s, F, y = guide.particles.detach(), toy.features[:16], toy.y[:16]
    score = 4 * (y - s @ F.T) @ F / NOISE**2 - kl_weight * s / PRIOR_SCALE**2
    expected = -stein_by_hand(list(s.numpy()), score.numpy()) / (4 * 64)
    np.testing.assert_allclose(guide.particles.grad.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_particles_gather_around_the_posterior_and_stay_apart(toy, exact):
    fit = sp.refit(posterior_of(toy), toy.rows, guide="svgd", num_steps=300, optimizer={"lr_loc": 0.03}, **QUIET)
    points, sd = fit.posterior.guide.points("s"), exact.covariance.diagonal().sqrt()
    assert isinstance(fit.posterior.guide, EmpiricalGuide) and len(points) == 8
    assert ((points.mean(0) - exact.mean).abs() / sd).max() < 0.1
    assert (points.std(0) / sd > 0.4).all() and (points.std(0) / sd < 1.2).all()
    assert fit.posterior.provenance["method"] == "SVGD"


def test_particles_are_two_or_more():
    with pytest.raises(ValueError, match="num_particles=1 must be a whole number, 2 or more"):
        ParticleGuide(torch.zeros(2), torch.ones(2), num_particles=1)


# comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def priors():
    """Exact posteriors of one data set under a wide, a narrow and a very narrow prior."""
    out = {}
    for scale in (0.02, PRIOR_SCALE, 0.2):
        toy = LinearToy(3, correlation=0.3, prior=scale)
        out[f"prior {scale}"] = posterior_of(toy)
    return out, toy.rows


def test_the_best_prediction_stands_first_and_the_gaps_follow_the_formulas(priors, toy):
    posteriors, rows = priors
    table = sp.compare(posteriors, rows, num_draws=400, seed=1)
    exact = {name: solve(toy.features, toy.y, float(name.split()[1])) for name in posteriors}
    assert table.index.tolist() == sorted(exact, key=lambda name: -exact[name].loo.sum())
    assert table.columns.tolist() == [
        *("elpd_loo", "se", "difference", "dse", "p_loo", "elbo", "pareto_k", "good_k", "bad_rows"),
        *("target", "warning"),
    ]
    assert table["target"].nunique() == 3 and (table["warning"] == "").all()
    assert table["good_k"].tolist() == [pytest.approx(1 - 1 / math.log10(400))] * 3
    assert (table["pareto_k"] < table["good_k"]).all()
    loo = {name: p.loo(rows, num_draws=400, seed=1) for name, p in posteriors.items()}
    best = loo[table.index[0]].elpd_i
    for name, row in table.iterrows():
        gap = best - loo[name].elpd_i
        assert (row.elpd_loo, row.se, row.p_loo) == pytest.approx((loo[name].elpd, loo[name].se, loo[name].p))
        assert row.difference == pytest.approx(gap.sum())
        assert row.dse == pytest.approx((len(gap) * gap.var()) ** 0.5)  # as se is of elpd, and as in ArviZ
        assert row.elpd_loo == pytest.approx(exact[name].loo.sum().item(), abs=0.5)
        assert row.elbo == pytest.approx(exact[name].evidence) and row.bad_rows == 0


def test_names_are_those_given_or_guide_and_prior(priors):
    posteriors, rows = priors
    table = sp.compare(list(posteriors.values())[:2], rows, num_draws=30)
    assert sorted(table.index) == [f"{i}: CovarianceGuide, FixedPrior(Normal(loc, scale))" for i in (0, 1)]


def test_a_point_has_no_loo_and_stands_last(priors, toy, exact):
    posteriors, rows = priors
    table = sp.compare({"point": posterior_of(toy, DeltaGuide(exact.mean)), **posteriors}, rows, num_draws=30)
    assert table.index[-1] == "point"
    point = table.loc["point"]
    assert point.drop(["bad_rows", "good_k", "target", "warning"]).isna().all() and point["bad_rows"] == 1
    assert point["warning"] == "a point has no LOO"


def two_chains(exact, shift=0.0, num_chains=2):
    """Independent draws of the exact posterior, as chains would be after long; the second may lie elsewhere."""
    q = dist.MultivariateNormal(exact.mean, exact.covariance)
    z = torch.as_tensor(np.random.default_rng(1).normal(size=(200, 3)))
    points = exact.mean + z @ q.scale_tril.T
    return EmpiricalGuide({"s": torch.cat([points[:100], points[100:] + shift])}, num_chains=num_chains)


def guides_of_one_target(exact):
    mean, covariance = exact.mean, exact.covariance
    mean_field = torch.diag(1 / torch.linalg.inv(covariance).diagonal())
    guides = {"wide": (mean, 9 * covariance), "narrow": (mean, 0.2 * covariance), "exact": (mean, covariance)}
    return {
        **guides,
        "mean field": (mean, mean_field),
        "shifted": (mean + 2 * covariance.diagonal().sqrt(), covariance),
    }


@pytest.mark.parametrize("seed", range(3))
def test_posteriors_of_one_target_are_ranked_by_the_elbo_and_chains_stand_first(toy, exact, seed):
    """Their LOO is the same number, so its estimates differ by their errors alone."""
    normals = guides_of_one_target(exact)
    posteriors = {name: posterior_of(toy, normal_guide(*q)) for name, q in normals.items()}
    posteriors["NUTS"] = posterior_of(toy, two_chains(exact))
    posteriors["stuck"] = posterior_of(toy, two_chains(exact, shift=3.0))
    table = sp.compare(posteriors, toy.rows, num_draws=100, seed=seed)
    by_elbo = sorted(normals, key=lambda name: -toy.elbo(*normals[name]))
    assert table.index.tolist() == ["NUTS", *by_elbo, "stuck"] and by_elbo[0] == "exact"
    assert set(table["target"]) == {"A"}
    assert table["difference"].iloc[1:].isna().all() and table["dse"].iloc[1:].isna().all()
    assert table.loc["NUTS", ["difference", "dse"]].tolist() == [0, 0]
    assert "r_hat" in table.loc["stuck", "warning"] and "pareto_k" not in table.loc["exact", "warning"]


def test_targets_are_told_apart_by_factors_prior_and_task(toy, exact):
    one, other = posterior_of(toy), posterior_of(toy, normal_guide(exact.mean, 2 * exact.covariance))
    moved = replace(one, factors=tuple((A, B + 1e-3) for A, B in one.factors))
    wider = replace(one, prior=posterior_of(LinearToy(3, correlation=0.3, prior=2.0)).prior)
    posteriors = {"one": one, "other": other, "moved": moved, "wider": wider}
    table = sp.compare(posteriors, toy.rows, num_draws=30)
    assert table["target"].to_dict() == {"one": "A", "other": "A", "moved": "B", "wider": "C"}
    firsts = table.groupby("target", sort=False)["elpd_loo"].first()
    assert firsts.is_monotonic_decreasing
    assert table.index.get_loc("one") + 1 == table.index.get_loc("other")


def test_rows_that_are_not_to_be_relied_on_are_marked_and_logged(toy, exact, caplog):
    far = posterior_of(toy, normal_guide(exact.mean + 4 * exact.covariance.diagonal().sqrt(), exact.covariance))
    one_chain = posterior_of(toy, two_chains(exact, num_chains=1))
    particles = posterior_of(toy, two_chains(exact, num_chains=None))
    posteriors = {"fine": posterior_of(toy), "far": far, "one chain": one_chain, "particles": particles}
    table = sp.compare(posteriors, toy.rows, num_draws=100)
    warnings = table["warning"]
    assert "pareto_k" in warnings["far"] and "above 0.50" in warnings["far"]
    assert "not known to be converged" in warnings["one chain"] and "no density" in warnings["particles"]
    assert "pareto_k" not in warnings["fine"]
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert all(f"{name}: {text}" in logged for name, text in warnings.items() if text)


def test_a_negative_number_of_parameters_is_marked(toy):
    weights = posterior_of(toy).log_weights(toy.rows, num_draws=30)
    loo = replace(weights.loo(), p=-0.5)
    assert "p_loo is negative" in _warning(weights, loo, None)


@pytest.mark.parametrize("nothing", [{}, []], ids=repr)
def test_comparing_nothing_is_refused(nothing, toy):
    with pytest.raises(ValueError, match="nothing to compare: pass at least one posterior"):
        sp.compare(nothing, toy.rows)


def test_comparing_what_are_no_posteriors_is_refused(toy):
    posterior = posterior_of(toy)
    for wrong in (posterior, [posterior, 1], {"a": sp.FitResult(posterior, None)}):
        with pytest.raises(TypeError, match=r"Posterior"):
            sp.compare(wrong, toy.rows, num_draws=30)


def test_posteriors_of_different_data_cannot_be_compared(toy):
    """LOO is the score of rows that a posterior was fitted to."""
    whole = posterior_of(toy)
    part = replace(whole, provenance={"num_data": 24})
    with pytest.raises(ValueError, match=r"24.*64|64.*24"):
        sp.compare({"whole": whole, "part": part}, toy.rows, num_draws=30)
