"""Fixed draws: the same function on every batch, whatever the chunks, the order or the padding."""

from dataclasses import replace

import gaussians
import numpy as np
import pytest
import tiny
import torch
import toys

import scalabl_pyro as sp
from scalabl_pyro.data import encode, evaluation_batches
from scalabl_pyro.prediction import predict as predictive
from scalabl_pyro.prediction.draws import sample_prior

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gpt2"]


def trained(family="llama", *, task=None, rows=None, model=None, num_steps=5, **options):
    """A posterior whose draws differ visibly."""
    blora = sp.bayesian_lora(model or tiny.causal_lm(family), **options)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    task = task or sp.MultipleChoice(tiny.tokenizer())
    rows = rows or tiny.question_rows(16)
    rates = {"lr": 3e-2, "lr_A": 3e-2}
    return sp.fit(
        blora, task, rows, num_steps=num_steps, **rates, init_scale=0.5, batch_size=8, progress=False
    ).posterior


@pytest.fixture(scope="module")
def posterior():
    return trained()


ROWS = tiny.question_rows(11, seed=9)


def test_the_result_does_not_depend_on_batch_size_chunks_or_order(posterior):
    reference = posterior.predict(ROWS, num_draws=6, batch_size=11)
    for options in (
        {"batch_size": 1},
        {"batch_size": 4},
        {"draws_per_pass": 1},
        {"draws_per_pass": 4, "batch_size": 3},
    ):
        other = posterior.predict(ROWS, num_draws=6, **options)
        np.testing.assert_allclose(other.log_probs, reference.log_probs, rtol=1e-4, atol=1e-5)
    backwards = posterior.predict(ROWS[::-1], num_draws=6)
    np.testing.assert_allclose(backwards.log_probs[:, ::-1], reference.log_probs, rtol=1e-4, atol=1e-5)


def test_the_result_does_not_depend_on_padding(posterior):
    together = posterior.predict(ROWS, num_draws=3)
    alone = np.concatenate([posterior.predict([row], num_draws=3).log_probs for row in ROWS], axis=1)
    np.testing.assert_allclose(together.log_probs, alone, rtol=1e-4, atol=1e-5)


def test_draws_have_identity(posterior):
    """Draw 3 is one vector: of 4 draws or of 40, before or after other work, on this batch or that."""
    few, many = posterior.sample(4, seed=2), posterior.sample(40, seed=2)
    assert torch.equal(few.s, many.s[:4])
    assert not torch.equal(posterior.sample(4, seed=3).s, few.s)
    ten = posterior.predict(ROWS, num_draws=10, seed=2)
    four = posterior.predict(ROWS[:5], num_draws=4, seed=2)
    np.testing.assert_allclose(ten.log_probs[:4, :5], four.log_probs, rtol=1e-4, atol=1e-5)


def test_zero_draws_are_the_posterior_mean(posterior):
    mean = posterior.predict(ROWS, num_draws=0)
    assert mean.num_draws == 0
    assert mean.log_probs.shape == (1, 11, 4)
    assert torch.equal(posterior.sample(0).s[0], posterior.mean())
    np.testing.assert_allclose(mean.epistemic, 0, atol=1e-6)
    with pytest.raises(ValueError, match="num_draws=-1 must be a whole number, 0 or more"):
        posterior.predict(ROWS, num_draws=-1)


def test_uncertainties_add_up(posterior):
    prediction = posterior.predict(ROWS, num_draws=20)
    np.testing.assert_allclose(prediction.total, prediction.aleatoric + prediction.epistemic, atol=1e-6)
    assert (prediction.epistemic > 0).all()
    assert (prediction.total <= np.log(4) + 1e-6).all()
    probs = np.exp(prediction.log_probs, dtype=np.float64)
    np.testing.assert_allclose(prediction.probs, probs.mean(0))
    by_hand = (probs * (prediction.log_probs - np.log(prediction.probs))).sum(-1).mean(0)
    np.testing.assert_allclose(prediction.epistemic, by_hand, atol=1e-6)


def test_log_likelihood_is_that_of_the_target(posterior):
    prediction = posterior.predict(ROWS, num_draws=3)
    for row, target in enumerate(prediction.target):
        np.testing.assert_array_equal(prediction.log_likelihood[:, row], prediction.log_probs[:, row, target])


def test_rows_without_answers_are_predicted_but_not_scored(posterior):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    prediction = posterior.predict(rows, num_draws=2)
    assert prediction.target is None
    assert "target" not in prediction.to_frame()
    with pytest.raises(ValueError, match="have no answers, so nothing can be scored"):
        prediction.metrics()


def test_rows_with_fewer_choices_give_no_weight_to_the_missing_ones(posterior):
    mixed = tiny.question_rows(3, num_choices=4) + tiny.question_rows(3, num_choices=2)
    prediction = posterior.predict(mixed, num_draws=4)
    assert prediction.probs.shape == (6, 4)
    assert (prediction.probs[3:, 2:] == 0).all()
    np.testing.assert_allclose(prediction.probs.sum(1), 1, rtol=1e-5)
    assert np.isfinite(prediction.total).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_the_lower_blocks_between_draws_changes_nothing(family, monkeypatch):
    """With the second block adapted alone, the first runs once for all draws."""
    posterior = trained(family, layers_to_transform=[1])
    blocks = posterior.adapter.module.get_submodule("transformer.h" if family == "gpt2" else "model.layers")
    rows_seen = []
    handle = blocks[0].register_forward_hook(lambda m, args, out: rows_seen.append(args[0].shape[0]))
    assert posterior.adapter.shares_prefix
    shared = posterior.predict(ROWS, num_draws=5, batch_size=11)
    assert rows_seen == [11]
    monkeypatch.setattr(type(posterior.adapter), "shares_prefix", property(lambda self: False))
    plain = posterior.predict(ROWS, num_draws=5, batch_size=11)
    assert rows_seen == [11, 55]
    handle.remove()
    np.testing.assert_allclose(shared.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
    assert shared.epistemic.max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classifiers_fold_draws_too(family):
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    rows = tiny.text_rows(12)
    posterior = trained(task=task, rows=rows, model=tiny.classifier(family), num_steps=30, layers_to_transform=[1])
    together = posterior.predict(rows, num_draws=4)
    looped = posterior.predict(rows, num_draws=4, draws_per_pass=1)
    np.testing.assert_allclose(together.log_probs, looped.log_probs, rtol=1e-4, atol=1e-5)
    assert together.epistemic.max() > 5e-6


def test_running_out_of_memory_halves_the_draws_a_pass(posterior, monkeypatch, caplog):
    reference = posterior.predict(ROWS, num_draws=8)
    real, sizes = predictive._outputs, []

    def limited(llm, task, s, *rest):
        sizes.append(len(s))
        if len(s) > 3:
            raise torch.OutOfMemoryError("pretend")
        return real(llm, task, s, *rest)

    monkeypatch.setattr(predictive, "_outputs", limited)
    prediction = posterior.predict(ROWS, num_draws=8)
    assert sizes[:3] == [8, 4, 2]
    assert "going on with 2 draws per pass" in caplog.text
    np.testing.assert_allclose(prediction.log_probs, reference.log_probs, rtol=1e-4, atol=1e-5)


def test_running_out_of_memory_with_one_draw_is_an_error(posterior, monkeypatch):
    def never(*args):
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(predictive, "_outputs", never)
    with pytest.raises(torch.OutOfMemoryError):
        posterior.predict(ROWS, num_draws=2)


def test_predict_leaves_modes_and_random_state_alone(posterior, unchanged_rng):
    llm = posterior.adapter.module
    llm.model.layers[0].train()
    modes = [m.training for m in llm.modules()]
    posterior.predict(ROWS, num_draws=2)
    assert [m.training for m in llm.modules()] == modes
    llm.eval()


def test_nan_logits_are_reported_by_row(posterior, monkeypatch):
    def poisoned(self, llm, batch, s):
        out = real(self, llm, batch, s)
        out[:, batch.index == 4] = torch.nan
        return out

    real = sp.MultipleChoice.outputs
    monkeypatch.setattr(sp.MultipleChoice, "outputs", poisoned)
    with pytest.raises(FloatingPointError, match=r"outputs of rows \[4\] are NaN"):
        posterior.predict(ROWS, num_draws=2)


def test_a_posterior_is_frozen_while_training_goes_on(task):
    blora = sp.bayesian_lora(tiny.causal_lm())
    rows = tiny.question_rows(16)
    first = sp.fit(blora, task, rows, num_steps=4, lr=1e-2, progress=False).posterior
    before = first.predict(ROWS, num_draws=3).log_probs
    second = sp.fit(blora, task, rows, num_steps=20, lr=5e-2, seed=1, progress=False).posterior
    np.testing.assert_array_equal(first.predict(ROWS, num_draws=3).log_probs, before)
    assert np.abs(second.predict(ROWS, num_draws=3).log_probs - before).max() > 1e-3


def test_the_plain_llm_can_run_under_one_draw(posterior):
    llm, s = posterior.adapter.module, posterior.sample(3, seed=5).s[2]
    batch = next(evaluation_batches(encode(ROWS[:1], posterior.task.encode, need_target=False), 1, 0))
    with torch.no_grad():
        expected = posterior.llm()(**batch.inputs, s=s).logits
        with posterior.draw(2, seed=5) as plain:
            assert plain is llm
            assert torch.equal(plain(**batch.inputs).logits, expected)
            tokens = plain.generate(batch.inputs["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
        greedy = expected[:, -1].argmax(-1)
    assert tokens[0, -3] == greedy[0]


def test_regression_splits_variance():
    task = sp.Regression(tiny.tokenizer(), noise_scale=0.5)
    rows = [{"text": r["question"], "label": float(r["answer"])} for r in tiny.question_rows(16)]
    posterior = trained(task=task, rows=rows, model=tiny.classifier("llama", num_labels=1))
    prediction = posterior.predict(rows, num_draws=30)
    assert isinstance(prediction, sp.NumericPrediction)
    np.testing.assert_allclose(prediction.aleatoric, posterior.task.noise_scale.item() ** 2, rtol=1e-5)
    np.testing.assert_allclose(prediction.epistemic, prediction.means.var(0), rtol=1e-5)
    np.testing.assert_allclose(prediction.total, prediction.aleatoric + prediction.epistemic)
    assert set(prediction.metrics()) == {"rmse", "mae", "nll"}
    assert prediction.replicates.shape == (30, 16)


def test_token_that_the_model_has_no_embedding_for_is_named_before_it_reaches_the_model(posterior):
    task = sp.MultipleChoice(tiny.tokenizer())
    task.tokenizer.add_tokens(["amber"])
    other = replace(posterior, task=task)
    rows = [*ROWS[:2], {**ROWS[2], "question": "what colour is amber ?"}]
    for call in (other.predict, other.log_weights, lambda rows: sp.fit(other.blora(), task, rows, progress=False)):
        with pytest.raises(ValueError, match="Row 2 has the token 59, but the model has embeddings for 0 to 58 only"):
            call(rows)


def test_pad_token_that_the_model_has_no_embedding_for_is_named(posterior):
    task = sp.MultipleChoice(tiny.tokenizer())
    task.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match="The pad token is 59, but the model has embeddings for 0 to 58 only"):
        replace(posterior, task=task).predict(ROWS)


def answers_and_draws(toy, kind, *, num_draws, seed):
    """(S, N) noise of the simulated answers, and the standardized draws of s (S, D) behind their means."""
    posterior = gaussians.posterior_of(toy)
    prediction = getattr(posterior, kind)(toy.rows[:16], num_draws=num_draws, seed=seed)
    if kind == "prior_predictive":
        s = sample_prior(posterior.prior, num_draws, seed=seed)
    else:
        s = posterior.sample(num_draws, seed=seed).s
    noise = (prediction.replicates - prediction.means) / np.sqrt(prediction.variances)
    return noise, ((s - s.mean(0)) / s.std(0)).numpy()


@pytest.mark.parametrize("kind", ["predict", "predict_linearized", "prior_predictive"])
@pytest.mark.parametrize("dim", [1, 4])
def test_simulated_answers_do_not_follow_the_draws(kind, dim):
    """Both come from one seed: the random numbers of the answers must not be those that made the draws."""
    noise, s = answers_and_draws(toys.LinearToy(dim), kind, num_draws=400, seed=3)
    flat = min(noise.size, s.size)
    in_order = np.corrcoef(noise.ravel()[:flat], s.ravel()[:flat])[0, 1]
    assert abs(in_order) < 5 / flat**0.5
    of_pairs = np.corrcoef(noise.T, s.T)[: noise.shape[1], noise.shape[1] :]
    assert np.abs(of_pairs).max() < 5 / len(s) ** 0.5
    # The same numbers in another order would show as repeated values.
    whitened = np.abs(noise.ravel()[:, None] - s.ravel()[None, :200]) < 1e-6
    assert whitened.sum() < 5


def test_replicates_in_arviz_data_have_random_numbers_of_their_own(posterior):
    prediction = posterior.predict(ROWS, num_draws=6, seed=3)
    answers = np.asarray(
        posterior.to_arviz(num_draws=6, seed=3, prediction=prediction)["posterior_predictive"]["label"]
    )
    shared = (prediction.log_probs + np.random.default_rng(3).gumbel(size=prediction.log_probs.shape)).argmax(-1)
    assert not np.array_equal(answers[0], shared)


@pytest.mark.parametrize("design", ["independent", "antithetic", "sobol"])
def test_seeds_and_counts_may_be_integers_of_numpy(posterior, design):
    numbers = {"num_draws": 2, "seed": 3, "batch_size": 4, "draws_per_pass": 1}
    given = posterior.predict(ROWS, **{name: np.int64(value) for name, value in numbers.items()}, design=design)
    expected = posterior.predict(ROWS, **numbers, design=design)
    np.testing.assert_array_equal(given.log_probs, expected.log_probs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"progress": "no"}, "progress='no': expected True or False"),
        ({"cache_prefix": None}, "cache_prefix=None: expected True or False"),
        ({"seed": 2**64}, "seed=18446744073709551616: expected"),
        ({"design": np.array(["sobol", "sobol"])}, "design=.* is unknown"),
    ],
    ids=str,
)
def test_switches_and_words_of_the_wrong_kind_are_refused(posterior, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        posterior.predict(ROWS, num_draws=1, **options)
