"""A trained adapter gets a posterior, and nothing but s is inferred."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gaussians import solve
from peft_cases import CASES, Case
from toys import LinearToy

import scalabl_pyro as sp
from scalabl_pyro.inference.largest_scale import mixture_nll

CHAIN = {"num_samples": 4, "warmup_steps": 2, "num_chains": 1, "max_tree_depth": 2, "progress": False}
OPTIONS = {
    "laplace": {},
    "vi": {"num_steps": 2, "progress": False},
    "mcmc": CHAIN,
    "tfb": {"num_draws": 2, "num_bisections": 2, "tolerance": 0.5},
}
ROWS = tiny.question_rows(12)
TEXTS = tiny.text_rows(12)


def adapted(task: str):
    """A trained adapter, its task and its rows."""
    if task == "questions":
        model = Case({"target_modules": ["q_proj", "v_proj"]}).model()
        return sp.from_peft(model), sp.MultipleChoice(tiny.tokenizer()), ROWS
    if task == "classifier":
        case = CASES["own head"]
        return sp.from_peft(case.model()), case.task(), case.rows
    rows = [{**row, "label": row["label"] / 2} for row in TEXTS]
    blora = sp.bayesian_lora(tiny.classifier(num_labels=1))
    regression = sp.Regression(tiny.tokenizer())
    return sp.fit(blora, regression, rows, num_steps=3, progress=False).posterior.blora(), regression, rows


def weights(blora, task) -> list[torch.Tensor]:
    """All that must stay: weights, factors, heads, parameters of the task, and the resting point."""
    named = [*blora.llm.parameters(), *blora.llm.buffers(), *task.parameters()]
    heads = [p for head in blora.adapter.heads.values() for p in head.parameters()]
    return [t.detach().clone() for t in (*named, *heads, blora.adapter.loc)]


@pytest.mark.filterwarnings("ignore::scalabl_pyro.ScalaBLWarning")
@pytest.mark.parametrize("task", ["questions", "classifier", "numbers"])
@pytest.mark.parametrize("method", OPTIONS)
def test_only_s_is_inferred_and_the_verbs_are_the_same(method, task, tmp_path, unchanged_rng):
    blora, task, rows = adapted(task)
    before = weights(blora, task)
    posterior = sp.posthoc(blora, task, rows, method=method, seed=1, **OPTIONS[method])
    assert all(torch.equal(a, b) for a, b in zip(weights(blora, task), before, strict=True))
    for pair, own in zip(posterior.factors, blora.adapter.factors(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, own, strict=True))
    draws = posterior.sample(3).s
    assert torch.isfinite(draws).all()
    assert method == "mcmc" or not torch.equal(draws[0], draws[1])  # so short a chain may stay where it is
    expected = posterior.predict(rows, num_draws=2)
    assert np.isfinite(expected.metrics().loc["value", "nll"])
    posterior.save_pretrained(tmp_path / "p")
    again = sp.Posterior.from_pretrained(blora.llm, tmp_path / "p").predict(rows, num_draws=2)
    np.testing.assert_array_equal(again.log_likelihood, expected.log_likelihood)


@pytest.mark.filterwarnings("ignore::scalabl_pyro.ScalaBLWarning")
@pytest.mark.parametrize("method", ["laplace", "tfb"])
def test_the_mean_is_the_adapter(method):
    blora, task, rows = adapted("questions")
    posterior = sp.posthoc(blora, task, rows, method=method, **OPTIONS[method])
    torch.testing.assert_close(posterior.mean(), blora.adapter.loc, rtol=0, atol=0)


def test_laplace_is_that_of_the_point():
    blora, task, rows = adapted("questions")
    point = sp.Posterior.capture(blora, task, sp.guides.DeltaGuide(blora.adapter.loc), provenance={})
    for options in ({"prior_scale": 0.3}, {"prior_scale": "evidence", "newton_steps": 1}):
        expected = sp.laplace(point, rows, **options)
        found = sp.posthoc(blora, task, rows, **options)
        torch.testing.assert_close(found.mean(), expected.mean())
        torch.testing.assert_close(found.guide.covariance(), expected.guide.covariance())
    by_default = sp.posthoc(blora, task, rows)
    half = 0.5 * point.mean().square().mean().sqrt().item()
    assert by_default.provenance["prior_scale"] == pytest.approx(half)


def test_laplace_vi_and_nuts_find_the_exact_posterior_of_a_linear_model():
    toy = LinearToy(3, num_data=48)
    exact = solve(toy.features, toy.y)
    found = sp.posthoc(toy.blora, toy.task, toy.rows, prior_scale=None, newton_steps=1)
    torch.testing.assert_close(found.mean().double(), exact.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.guide.covariance().double(), exact.covariance, rtol=1e-3, atol=1e-6)
    draws = 400
    chains = sp.posthoc(
        toy.blora, toy.task, toy.rows, method="mcmc", num_samples=draws, warmup_steps=100, progress=False, seed=2
    )
    s = chains.guide.sample(2 * draws, seed=0)["s"].double()
    effective = chains.provenance["ess"]
    error = (exact.covariance.diagonal() / effective).sqrt()
    assert ((s.mean(0) - exact.mean).abs() < 5 * error + 5 * s.std(0) / (2 * draws) ** 0.5).all()
    steps = {"num_steps": 600, "batch_size": 48, "lr": 0.05, "progress": False}
    vi = sp.posthoc(toy.blora, toy.task, toy.rows, method="vi", **steps)
    scale = exact.covariance.diagonal().sqrt()
    assert ((vi.mean().double() - exact.mean).abs() < 0.5 * scale).all()
    assert ((vi.sample(2000).s.std(0).double() / scale - 1).abs() < 0.3).all()


def overfitted():
    """An adapter of maximum likelihood, which noise can only harm."""
    task = sp.MultipleChoice(tiny.tokenizer())
    options = {"lr": 1e-2, "num_steps": 80, "batch_size": 12, "progress": False}
    return sp.baselines.mle(tiny.causal_lm(), task, ROWS, **options).posterior.blora(), task, ROWS


def test_the_noise_is_the_largest_that_keeps_the_nll():
    blora, task, rows = overfitted()
    options = {"num_draws": 4, "num_bisections": 8, "tolerance": 0.5, "max_scale": 4.0}
    found = sp.posthoc(blora, task, rows, method="tfb", seed=3, **options)
    scale = found.provenance["scale"]
    without = mixture_nll(found.predict(rows, num_draws=0))
    assert found.provenance["anchor_nll_without_noise"] == pytest.approx(without)

    def nll(value: float) -> float:
        guide = sp.guides.NormalGuide(blora.adapter.loc, torch.full_like(blora.adapter.loc, value))
        tried = sp.Posterior.capture(blora, task, guide, provenance={})
        return mixture_nll(tried.predict(rows, num_draws=4, seed=3))

    assert 0 < scale < 4.0
    assert nll(scale) <= 1.5 * without < nll(scale + 4.0 / 2**8)
    torch.testing.assert_close(found.guide.covariance().diagonal(), torch.full_like(blora.adapter.loc, scale**2))


@pytest.mark.parametrize(
    ("tolerance", "max_scale", "hint"), [(100.0, 0.1, "raise max_scale"), (1e-12, 4.0, "no noise: raise tol")]
)
def test_a_search_that_ends_at_a_limit_says_so(tolerance, max_scale, hint):
    blora, task, rows = overfitted()
    options = {"num_draws": 2, "num_bisections": 3, "tolerance": tolerance, "max_scale": max_scale}
    with pytest.warns(sp.ScalaBLWarning, match=hint) as caught:
        posterior = sp.posthoc(blora, task, rows, method="tfb", seed=3, **options)
    assert {w.filename for w in caught if w.category is sp.ScalaBLWarning} == {__file__}  # the line of the user
    assert torch.isfinite(posterior.sample(2).s).all()
    found = posterior.provenance  # it describes the guide that is returned, also where no scale passes
    assert found["scale"] == (max_scale if max_scale == 0.1 else 0.0)
    torch.testing.assert_close(posterior.sample(400).s.std(), torch.tensor(found["scale"]), rtol=0.1, atol=0)
    assert found["anchor_nll"] == pytest.approx(mixture_nll(posterior.predict(rows, num_draws=2, seed=3)), rel=1e-6)


def test_an_adapter_from_a_file_goes_the_whole_way(tmp_path: Path):
    Case({"target_modules": ["q_proj"]}).model().save_pretrained(tmp_path / "a")
    blora = sp.from_peft(tiny.causal_lm(), tmp_path / "a")
    posterior = sp.posthoc(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS)
    assert posterior.provenance["method"] == "Laplace" and posterior.provenance["num_data"] == len(ROWS)
    assert len(posterior.export_peft(tmp_path / "out", draws=2)) == 2


# bad input --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return adapted("questions")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "laplas"}, ValueError, "method.*'laplace'"),
        ({"method": "laplace", "num_steps": 3}, TypeError, r"no option 'num_steps'\. It belongs to method='vi'\."),
        ({"method": "laplace", "num_draws": 3}, TypeError, r"'num_draws'\. It belongs to method='tfb'\."),
        ({"method": "laplace", "tolerance": 3}, TypeError, r"'tolerance'\. It belongs to method='tfb'"),
        ({"method": "tfb", "newton_steps": 3}, TypeError, "It belongs to method='laplace'"),
        ({"method": "tfb", "tolerence": 3}, TypeError, "tolerance"),
        ({"method": "mcmc", "prior_scale": 3}, TypeError, "It belongs to method='laplace'"),
        (
            {"method": "vi", "tolerance": 1},
            TypeError,
            r"method='vi' has no option 'tolerance'.*belongs to method='tfb'",
        ),
        ({"method": "vi", "epochs": 1}, TypeError, "Did you mean 'num_steps'"),
        ({"method": "tfb", "tolerance": -1}, ValueError, "tolerance=-1"),
        ({"method": "tfb", "max_scale": float("inf")}, ValueError, "max_scale"),
        ({"method": "tfb", "num_draws": 0}, ValueError, "num_draws=0"),
        ({"method": "vi", "batch_size": 0}, ValueError, "batch_size=0"),
        ({"method": "vi", "batch_size": "a"}, (TypeError, ValueError), "batch_size"),
        ({"method": "laplace", "prior_scale": "large"}, ValueError, "prior_scale='large'"),
    ],
)
def test_wrong_options(world, options, error, message):
    blora, task, rows = world
    before = weights(blora, task)
    with pytest.raises(error, match=message):
        sp.posthoc(blora, task, rows, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(blora, task), before, strict=True))


@pytest.mark.parametrize("method", OPTIONS)
def test_an_adapter_without_training_and_rows_without_answers_are_refused(method, world):
    blora, task, rows = world
    with pytest.raises(ValueError, match=r"not trained.*from_peft"):
        sp.posthoc(sp.bayesian_lora(tiny.causal_lm()), task, rows, method=method)
    unanswered = [{k: v for k, v in row.items() if k != "answer"} for row in rows]
    with pytest.raises(ValueError, match="answer"):
        sp.posthoc(blora, task, unanswered, method=method, **OPTIONS[method])


def test_wrong_objects(world):
    blora, task, rows = world
    with pytest.raises(TypeError, match="Wrap the model first"):
        sp.posthoc(blora.llm, task, rows)
    with pytest.raises(TypeError, match="task"):
        sp.posthoc(blora, tiny.tokenizer(), rows)
