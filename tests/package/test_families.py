"""Every model family and every task goes the whole way: fit, predict, save, load, unload."""

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp

CAUSAL = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma", "gpt2"]
CLASSIFIERS = ["llama", "qwen2", "gpt2", "bert"]


def questions():
    return sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(12)


def chat_questions():
    return sp.MultipleChoice(tiny.tokenizer(chat=True)), tiny.question_rows(12)


def topics():
    return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"]), tiny.text_rows(12)


def numbers():
    rows = [{**row, "label": row["label"] / 2} for row in tiny.text_rows(12)]
    return sp.Regression(tiny.tokenizer()), rows


CASES = [
    *[(tiny.causal_lm, family, questions) for family in CAUSAL],
    (tiny.causal_lm, "llama", chat_questions),
    *[(tiny.classifier, family, topics) for family in CLASSIFIERS],
    *[(lambda f, **o: tiny.classifier(f, num_labels=1, **o), family, numbers) for family in ("llama", "bert")],
]
IDS = [f"{family}-{make.__name__}" for _, family, make in CASES]


def scores(prediction):
    return prediction.log_probs if isinstance(prediction, sp.Prediction) else prediction.means


@pytest.mark.parametrize(("build", "family", "make"), CASES, ids=IDS)
def test_fit_predict_save_load_unload(build, family, make, tmp_path, unchanged_rng):
    task, rows = make()
    llm = build(family)
    state = {k: v.clone() for k, v in llm.state_dict().items()}
    blora = sp.bayesian_lora(llm)  # word for word: nothing but the module
    result = sp.fit(blora, task, rows, num_steps=3, batch_size=4, progress=False)

    assert list(result.history["step"]) == [0, 1, 2]
    assert np.isfinite(result.history.to_numpy()).all()
    assert all(torch.isfinite(t).all() for pair in result.posterior.factors for t in pair)
    prediction = result.posterior.predict(rows, num_draws=4, seed=1)
    assert scores(prediction).shape[:2] == (4, 12)

    result.posterior.save_pretrained(tmp_path / "posterior")
    loaded = sp.Posterior.from_pretrained(build(family), tmp_path / "posterior")
    np.testing.assert_array_equal(scores(loaded.predict(rows, num_draws=4, seed=1)), scores(prediction))

    assert blora.unload() is llm
    assert set(llm.state_dict()) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in llm.state_dict().items())


@pytest.mark.parametrize(("build", "family", "make"), CASES, ids=IDS)
def test_every_learned_tensor_gets_a_gradient(build, family, make):
    task, rows = make()
    blora = sp.bayesian_lora(build(family))
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))  # at B = 0 nothing reaches A and s
    point = dict(blora.point_estimates.named_parameters())
    before = {n: p.detach().clone() for n, p in point.items()}
    result = sp.fit(blora, task, rows, num_steps=2, progress=False, lr=1e-2)
    still = [n for n, p in point.items() if torch.equal(p, before[n])]
    assert not still
    start = sp.guides.as_guide("normal", blora)
    assert (result.posterior.guide.scale != start.scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_base_may_have_another_dtype(dtype, tmp_path):
    task, rows = questions()
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=dtype))
    posterior = sp.fit(blora, task, rows, num_steps=3, progress=False).posterior
    latent = torch.float64 if dtype == torch.float64 else torch.float32
    assert posterior.guide.loc.dtype == latent
    assert all(t.dtype == latent for pair in posterior.factors for t in pair)
    prediction = posterior.predict(rows, num_draws=2)
    assert np.isfinite(prediction.log_probs).all()
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(dtype=dtype), tmp_path / "p")
    np.testing.assert_array_equal(loaded.predict(rows, num_draws=2).log_probs, prediction.log_probs)


def test_a_trained_head_is_saved_and_the_original_comes_back():
    task, rows = topics()
    llm = tiny.classifier("llama")
    original = llm.score.weight.clone()
    blora = sp.bayesian_lora(llm)
    posterior = sp.fit(blora, task, rows, num_steps=5, lr=1e-2, progress=False).posterior
    assert set(posterior.heads) == {"score"}
    assert not torch.equal(posterior.heads["score"].weight, original)
    assert torch.equal(llm.score.weight, original)  # the base is never written to
    ids = torch.arange(2, 8)[None]
    with torch.no_grad(), blora.disabled():
        disabled = llm(ids).logits
    blora.unload()
    assert torch.equal(llm(ids).logits, disabled)


def test_a_head_can_be_kept_as_it_is():
    blora = sp.bayesian_lora(tiny.classifier("llama"), modules_to_save=())
    assert blora.adapter.heads == {}
    assert not any("score" in name for name, _ in blora.named_parameters())


def test_an_existing_peft_adapter_goes_the_whole_way(tmp_path):
    from peft import LoraConfig, get_peft_model

    task, rows = questions()
    model = get_peft_model(tiny.causal_lm(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"], lora_dropout=0.1))
    blora = sp.bayesian_lora(model)
    posterior = sp.fit(blora, task, rows, num_steps=3, progress=False).posterior
    prediction = posterior.predict(rows, num_draws=3)
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")  # into the plain base model
    np.testing.assert_allclose(loaded.predict(rows, num_draws=3).log_probs, prediction.log_probs, rtol=1e-5)
