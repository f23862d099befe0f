"""Training on completions, and what a posterior of them can do."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from completions import EXACT, FEW, NOUNS, adapted, batch_of, draws_of, posterior_of, rows, tokenizer
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from stock import train_with_stock_svi

import scalabl_pyro as sp
from scalabl_pyro._process.random_state import derive_seed
from scalabl_pyro.data import Example, TrainingBatches, encode


@pytest.fixture
def task():
    return sp.Completion(tokenizer())


class NextToken(sp.Task):
    """The token after a prompt, as a class among all tokens."""

    without_tokenizer = False

    def encode(self, row):
        ids = self.tokenizer(row["prompt"]).input_ids
        return Example({"input_ids": ids}, self.tokenizer(row["completion"]).input_ids[0])

    def outputs(self, llm, batch, s):
        return llm(input_ids=batch.inputs["input_ids"], s=s, positions=batch.last).logits[..., 0, :]

    def likelihood(self, outputs, batch):
        return dist.Categorical(logits=outputs)


def one_token_rows(n=12):
    return [
        {"prompt": row["prompt"], "completion": NOUNS[row["prompt"].split()[-2]]}
        for row in rows(n)
        if "?" in row["prompt"]
    ]


def same_factors(one, other, **tolerance):
    for a, b in zip(one.guide.parameters(), other.guide.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for pair, twin in zip(one.factors, other.factors, strict=True):
        for a, b in zip(pair, twin, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_completions_of_one_token_train_as_classes_over_the_vocabulary():
    data = [{**row, "completion": row["completion"].split()[0]} for row in one_token_rows()]
    options = {**FEW, "num_steps": 6, "lr": 1e-2, "seed": 3}
    one = sp.fit(adapted(), sp.Completion(tokenizer(), end_token=False), data, **options)
    other = sp.fit(adapted(), NextToken(tokenizer()), data, **options)
    for name in ("loss", "nll", "kl", "grad_norm"):
        np.testing.assert_allclose(one.history[name], other.history[name], rtol=1e-9)
    same_factors(one.posterior, other.posterior, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one.history["nll_per_token"], one.history["nll"])
    assert "nll_per_token" not in other.history


def test_stock_svi_and_fit_reach_equal_parameters(stock_pyro, task):
    data, steps, size, seed = rows(12), 5, 4, 3
    options = {"lr_scale": 1e-2, "schedule": "constant", "warmup": 0.0}
    fitted = sp.fit(
        adapted(), task, data, num_steps=steps, batch_size=size, lr=1e-2, lr_A=1e-2, optimizer=options, seed=seed,
        progress=False,
    ).posterior  # fmt: skip
    twin = adapted()
    guide = sp.guides.as_guide("normal", twin, seed=derive_seed(seed, "initial scales"))
    batches = TrainingBatches(encode(data, task.encode, need_target=True), size, task.pad_token_id, seed=seed)
    train_with_stock_svi(twin, task, guide, batches, num_data=len(data), steps=steps, seed=seed)
    torch.testing.assert_close(fitted.guide.loc, guide.loc.data, **EXACT)
    torch.testing.assert_close(fitted.guide.scale, guide.scale.data, **EXACT)
    for (A, B), (own_A, own_B) in zip(fitted.factors, twin.adapter.factors(), strict=True):
        torch.testing.assert_close(A, own_A.data / own_A.data.norm(dim=1, keepdim=True), **EXACT)
        torch.testing.assert_close(B, own_B.data, **EXACT)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)],
                         ids=["one particle", "three particles"])  # fmt: skip
def test_other_estimators_train_completions(task, elbo):
    history = sp.fit(adapted(), task, rows(), **FEW, elbo=elbo, draws="shared").history
    assert np.isfinite(history["loss"]).all()


@pytest.mark.parametrize(
    "hardware", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}, {"cache_prefix": True}], ids=str
)
def test_options_of_the_hardware_change_nothing(task, hardware):
    options = {**FEW, "guide": "delta"}  # micro-batches of other guides draw s of their own
    whole = sp.fit(adapted(layers_to_transform=[1]), task, rows(8), **options)
    other = sp.fit(adapted(layers_to_transform=[1]), task, rows(8), **options, hardware=hardware)
    np.testing.assert_allclose(other.history["nll_per_token"], whole.history["nll_per_token"], rtol=1e-9)
    same_factors(whole.posterior, other.posterior, **EXACT)


def test_a_resumed_run_ends_with_the_same_bits(task, tmp_path):
    data, options = rows(8), {**FEW, "num_steps": 6, "checkpoint": {"every": 2}}
    whole = sp.fit(adapted(), task, data, **options, checkpoint_dir=tmp_path / "whole")
    stop = [lambda row: row["step"] == 3]
    sp.fit(adapted(), task, data, **options, checkpoint_dir=tmp_path / "parts", callbacks=stop)
    resumed = sp.fit(adapted(), task, data, **options, checkpoint_dir=tmp_path / "parts")
    same_factors(whole.posterior, resumed.posterior, rtol=0, atol=0)
    columns = ["loss", "nll", "kl", "nll_per_token"]
    np.testing.assert_array_equal(whole.history[columns], resumed.history[columns])


def test_the_nll_per_token_is_that_of_the_tokens_of_the_batch(task):
    data = rows()
    history = sp.fit(adapted(), task, data, **{**FEW, "num_steps": 1, "batch_size": 6}).history
    count = sum(len(task.encode(row).target) for row in data)
    np.testing.assert_allclose(history["nll_per_token"], history["nll"] * 6 / count)


def test_a_posterior_is_saved_with_its_task(tmp_path):
    task = sp.Completion(tokenizer(chat=True), chat=True, turns="last", max_length=40, chat_options={"tone": "kind"})
    task.tokenizer.chat_template = "{{ tone }}" + task.tokenizer.chat_template
    posterior = posterior_of(adapted(), task)
    posterior.save_pretrained(tmp_path / "posterior")
    llm = tiny.causal_lm(dtype=torch.float64)
    loaded = sp.Posterior.from_pretrained(llm, tmp_path / "posterior")
    for name in sp.Completion.options:
        assert getattr(loaded.task, name) == getattr(task, name), name
    s = posterior.sample(2, seed=0).s
    was, now = (p.log_likelihood(rows()).by_row(s) for p in (posterior, loaded))
    torch.testing.assert_close(now, was, rtol=0, atol=0)


def test_rows_count_as_observations_in_loo_and_diagnose(task):
    posterior = posterior_of(adapted(), task, rows(8), num_steps=10)
    loo = posterior.loo(rows(8), num_draws=50)
    assert len(loo.elpd_i) == 8 and np.isfinite(loo.elpd)
    diagnosis = posterior.diagnose(rows(8), num_draws=50)
    assert "pareto_k" in {finding.check for finding in diagnosis.findings}
    idata = posterior.to_arviz(num_draws=20)
    assert idata["posterior"]["s"].shape[1] == 20


REFUSED = {
    "predict": lambda p: p.predict(rows()),
    "predict, averages": lambda p: p.predict(rows(), keep_draws=False),
    "predict prompts": lambda p: p.predict([{"prompt": "the sky is"}]),
    "predict_linearized": lambda p: p.predict_linearized(rows()),
    "prior_predictive": lambda p: p.prior_predictive(rows()),
    "laplace": lambda p: sp.laplace(p, rows()),
    "posthoc": lambda p: sp.posthoc(p.blora(), p.task, rows(), method="laplace"),
    "tfb": lambda p: sp.baselines.tfb(p, rows()),
    "temperature": lambda p: sp.baselines.temperature_scaling(p, rows()),
}


@pytest.fixture(scope="module")
def trained():
    return posterior_of(adapted(), sp.Completion(tokenizer()))


@pytest.mark.parametrize("call", REFUSED)
def test_what_needs_all_answers_is_refused_with_the_way_out(trained, call):
    with pytest.raises(
        TypeError, match=r"every possible answer.*score\(rows\).*generate\(prompts\).*method='vi' or 'tfb'"
    ):
        REFUSED[call](trained)


def test_tfb_finds_the_largest_noise_that_keeps_the_scores_of_completions(task):
    blora = posterior_of(adapted(), task, num_steps=30).blora()
    options = {"num_draws": 4, "seed": 3}
    found = sp.posthoc(blora, task, rows(), method="tfb", tolerance=0.05, num_bisections=8, **options)

    def nll(posterior, scale):
        guide = sp.guides.NormalGuide(found.guide.loc, torch.full_like(found.guide.loc, scale))
        noisy = replace(posterior, guide=guide.requires_grad_(False).eval())
        return -noisy.score(rows(), **options).log_prob.mean()

    scale, limit = found.provenance["scale"], 1.05 * -found.score(rows(), num_draws=0).log_prob.mean()
    assert 0 < scale < 1 and torch.all(found.guide.scale == scale)
    assert found.provenance["anchor_nll"] == pytest.approx(nll(found, scale), rel=1e-9) and nll(found, scale) <= limit
    assert nll(found, scale + 2**-8) > limit  # one bisection further


def test_other_methods_of_posthoc_take_completions(task):
    blora = adapted()
    for method, options in (
        ("vi", {"num_steps": 2, "progress": False}),
        ("mcmc", {"num_samples": 4, "warmup_steps": 1, "num_chains": 1, "progress": False}),
    ):
        posterior = sp.posthoc(blora, task, rows(), method=method, **options)
        assert np.isfinite(posterior.score(rows(), num_draws=2).log_prob).all()


def test_answers_that_were_not_given_have_no_probability(task):
    blora = adapted()
    batch = batch_of(task, rows())
    given = task.distribution(task.outputs(blora, batch, draws_of(blora, 1)), batch)
    torch.testing.assert_close(given.log_prob(batch.target.clone()), given.log_prob(batch.target))
    with pytest.raises(ValueError, match=r"given completions only.*posterior.score"):
        given.log_prob(batch.target + 1)
    with pytest.raises(NotImplementedError, match=r"posterior.generate"):
        given.sample()
    with pytest.raises(ValueError, match=r"no list of answers.*posterior.score\(rows\).*posterior.generate"):
        task.outputs(blora, batch.without_target(), draws_of(blora, 1))
