"""Wherever a posterior is used, a text in windows is one row: inference, caches, processes, programs and services."""

import json
import logging

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from completions import spread
from processes import results, run_together
from test_windows import CLASSES, EXACT, ROWS, SIZE, by_hand, classifier, posterior_of, task_of
from tokenizers import processors

import scalabl_pyro as sp
from scalabl_pyro.baselines import laplace_lora, mle
from scalabl_pyro.cli import main as cli
from scalabl_pyro.data import encode
from scalabl_pyro.model.derivatives import gauss_newton
from scalabl_pyro.tasks.windows import context_of, windows_of

LABELS = torch.tensor([row["label"] for row in ROWS])


def with_marks(**options):
    """A tokenizer that puts a token before and behind each text, as those of BERT do."""
    tokenizer = tiny.tokenizer()
    marks = [(word, tokenizer.convert_tokens_to_ids(word)) for word in ("Q", "A")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="Q $A A", special_tokens=marks)
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return tokenizer


def hand_log_likelihood(posterior, rule, num_draws):
    """(S, N) from the formula."""
    found = by_hand(posterior, ROWS, rule, 0, num_draws)
    return found.gather(-1, LABELS.expand(num_draws, -1).unsqueeze(-1))[..., 0].numpy()


@pytest.mark.parametrize("overlap", [0, 1])
def test_each_window_has_the_special_tokens(overlap):
    tokenizer, text = with_marks(), "the sky is blue what colour is grass"
    before, after = tokenizer.convert_tokens_to_ids(["Q", "A"])
    found = windows_of(tokenizer, text, 5, overlap)["input_ids"]
    parts = [found[i : i + 5] for i in range(0, len(found), 5)]
    assert all(part[0] == before and part[-1] == after for part in parts)
    texts = [parts[0][1:-1], *(part[1 + overlap : -1] for part in parts[1:])]
    assert [token for part in texts for token in part] == tokenizer(text, add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match="max_length=5 leaves 3 tokens of a window for the text"):
        windows_of(tokenizer, text, 5, 3)


@pytest.mark.parametrize("rule", ["logits", "probs"])
@torch.no_grad()
def test_windows_with_special_tokens_are_those_of_the_formula(rule):
    tokenizer = with_marks()
    task = sp.SequenceClassification(tokenizer, classes=CLASSES, max_length=SIZE, windows=rule)
    posterior = posterior_of(task)
    draws, llm, expected = posterior.sample(3, seed=0), posterior.llm(), []
    for row in ROWS:
        words = row["text"].split()
        each = [tokenizer(" ".join(words[i : i + SIZE - 2])).input_ids for i in range(0, len(words), SIZE - 2)]
        shares = torch.tensor([len(ids) for ids in each], dtype=torch.float64)
        shares = (shares / shares.sum())[:, None, None]
        logits = torch.stack([llm(input_ids=torch.tensor([ids]), s=draws.s.unsqueeze(1)).logits[:, 0] for ids in each])
        mean = (
            (shares * logits).sum(0).log_softmax(-1) if rule == "logits" else (shares * logits.softmax(-1)).sum(0).log()
        )
        expected.append(mean)
    found = posterior.predict(ROWS, num_draws=3, seed=0).log_probs
    np.testing.assert_allclose(found, torch.stack(expected, 1).numpy(), **EXACT)


@pytest.mark.parametrize("rule", ["logits", "probs"])
@torch.no_grad()
def test_the_log_likelihood_is_by_row_in_whatever_batches(rule):
    posterior = posterior_of(task_of(rule))
    s, expected = posterior.sample(4, seed=0).s, hand_log_likelihood(posterior, rule, 4)
    for size in (1, 2, 5):
        likelihood = posterior.log_likelihood(ROWS, batch_size=size)
        np.testing.assert_allclose(likelihood.by_row(s), expected, **EXACT)
        np.testing.assert_allclose([float(likelihood(one)) for one in s], expected.sum(1), **EXACT)
    weights = posterior.log_weights(ROWS, num_draws=30, seed=0)
    assert weights.loo().elpd_i.shape == (len(ROWS),)


@pytest.mark.parametrize("rule", ["logits", "probs"])
def test_the_gauss_newton_matrix_is_that_of_the_combined_outputs(rule):
    posterior = posterior_of(task_of(rule))
    llm, s, expected = posterior.llm(), posterior.mean(), 0.0

    def outputs(s, row):
        ids = tiny.tokenizer()(row["text"]).input_ids
        parts = [ids[i : i + SIZE] for i in range(0, len(ids), SIZE)]
        each = torch.stack([llm(input_ids=torch.tensor([part]), s=s.unsqueeze(0)).logits[0] for part in parts])
        shares = torch.tensor([len(part) / len(ids) for part in parts], dtype=torch.float64)[:, None]
        return (shares * each).sum(0).log_softmax(-1) if rule == "logits" else (shares * each.softmax(-1)).sum(0).log()

    for row in ROWS:
        J = torch.autograd.functional.jacobian(lambda s, row=row: outputs(s, row), s)
        p = outputs(s, row).detach().exp()
        expected = expected + J.T @ (p.diag() - p.outer(p)) @ J
    for size in (1, 5):
        found = gauss_newton(posterior.log_likelihood(ROWS, batch_size=size), s)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)  # s is float32


def test_laplace_nuts_and_posthoc_take_windows():
    posterior = posterior_of(task_of("probs"))
    new = sp.laplace(posterior, ROWS, batch_size=2)
    assert new.task.windows == "probs" and new.predict_linearized(ROWS, num_draws=3).log_probs.shape == (3, 5, 3)
    chains = sp.mcmc(posterior, ROWS, num_samples=4, warmup_steps=2, num_chains=1, max_tree_depth=2, progress=False)
    assert np.isfinite(chains.predict(ROWS, num_draws=3).log_probs).all()
    blora = spread(sp.bayesian_lora(classifier()))
    found = sp.posthoc(blora, task_of("logits"), ROWS)
    assert found.provenance["num_data"] == len(ROWS)


def test_kept_hidden_states_are_refused_as_for_every_classification_model():
    message = "cache_prefix=True: no fixed blocks lie below"
    blora = sp.bayesian_lora(classifier(), target_modules=["q_proj"], layers_to_transform=[1], modules_to_save=[])
    with pytest.raises(ValueError, match=message):
        sp.fit(blora, task_of("probs"), ROWS, num_steps=1, progress=False, hardware={"cache_prefix": True})
    with pytest.raises(ValueError, match=message):
        posterior_of(task_of("probs")).predict(ROWS, cache_prefix=True)


def test_kronecker_factors_are_refused_by_name():
    with pytest.raises(ValueError, match="SequenceClassification reads 8 sequences for 2 rows, such as windows"):
        fitted = mle(classifier(), task_of("logits"), ROWS, num_steps=2, progress=False).posterior
        laplace_lora(fitted, ROWS, batch_size=2).predict(ROWS)


def test_held_out_rows_are_scored_as_predictions_are():
    blora = sp.bayesian_lora(classifier())
    options = {"num_steps": 2, "eval_data": ROWS[3:], "eval_every": 2, "progress": False, "lr": 1e-2}
    result = sp.fit(blora, task_of("probs", 1), ROWS[:3], evaluation={"num_draws": 0}, **options)
    nll = float(result.posterior.predict(ROWS[3:], num_draws=0).metrics().loc["value", "nll"])
    assert result.evaluations["eval_nll"].iloc[-1] == pytest.approx(nll, rel=1e-6)


def test_the_memory_of_a_step_counts_the_windows():
    blora = sp.bayesian_lora(classifier())
    short = [{"text": "the sky is", "label": 0}] * 4
    long = [{"text": "the sky is " * 20, "label": 0}] * 4
    few, many = (blora.estimate_memory(rows, task=task_of("probs")).activations for rows in (short, long))
    assert 6 * few < many < 30 * few


def learned_by_all(rank, micro=None):
    torch.manual_seed(rank)
    hardware = {} if micro is None else {"micro_batch_size": micro}
    blora = sp.bayesian_lora(classifier())
    result = sp.fit(blora, task_of("probs", 1), ROWS, num_steps=4, batch_size=5, hardware=hardware, progress=False)
    return result.history["loss"].to_numpy(), result.posterior.predict(ROWS, num_draws=2).log_probs


def test_two_processes_learn_windows_as_one_does(tmp_path):
    expected = learned_by_all(0)
    for found in results(run_together(learned_by_all, tmp_path)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


def test_a_run_with_other_windows_is_not_resumed(tmp_path):
    options = {"num_steps": 2, "progress": False, "checkpoint_dir": tmp_path, "checkpoint": {"every": 1}}
    sp.fit(sp.bayesian_lora(classifier()), task_of("logits"), ROWS, **options)
    with pytest.raises(ValueError, match="windows"):
        sp.fit(sp.bayesian_lora(classifier()), task_of("probs"), ROWS, **options)


def test_the_length_of_a_window_is_what_the_tokenizer_says(caplog):
    assert context_of(tiny.tokenizer()) is None
    task = sp.SequenceClassification(with_marks(model_max_length=7), classes=CLASSES, windows="probs")
    assert task.max_length == task.window_length == 7
    assert sp.SequenceClassification(with_marks(model_max_length=7), classes=CLASSES).max_length is None
    with caplog.at_level(logging.WARNING):
        encode(ROWS, task.encode, need_target=True)
        assert not caplog.records
        encode(
            ROWS, sp.SequenceClassification(tiny.tokenizer(), classes=CLASSES, max_length=6).encode, need_target=True
        )
    assert caplog.records[0].getMessage().endswith("or read such texts in windows: windows='logits'.")


def test_an_unknown_token_is_named_with_its_row_and_a_window_with_its_length():
    llm = classifier()
    wrong = tiny.tokenizer()
    wrong.add_tokens(["zebra"])
    task = sp.SequenceClassification(wrong, classes=CLASSES, max_length=SIZE, windows="logits")
    rows = [*ROWS, {"text": "the sky is zebra", "label": 0}]
    with pytest.raises(ValueError, match=f"Row {len(ROWS)} has the token"):
        sp.fit(sp.bayesian_lora(llm), task, rows, num_steps=1, progress=False)
    bert = tiny.classifier("bert")
    limit = bert.config.max_position_embeddings
    task = sp.SequenceClassification(tiny.tokenizer(), classes=CLASSES, max_length=limit + 1, windows="logits")
    with pytest.raises(ValueError, match=f"Row 1 has {limit + 1} tokens in a window, but"):
        sp.fit(sp.bayesian_lora(bert), task, [ROWS[0], {"text": "sky " * 3 * limit, "label": 0}], num_steps=1)


def test_scikit_learn_reads_windows():
    pytest.importorskip("sklearn")
    from sklearn.base import clone

    from scalabl_pyro.integrations import ScalaBLClassifier, ScalaBLRegressor

    texts = [row["text"] for row in ROWS]
    own = {"tokenizer": tiny.tokenizer(), "max_length": SIZE, "windows": "logits", "overlap": 1, "num_steps": 2}
    found = clone(ScalaBLClassifier(classifier(), **own)).fit(texts, LABELS.numpy())
    assert (found.posterior_.task.windows, found.posterior_.task.overlap) == ("logits", 1)
    assert found.predict_proba(texts).shape == (5, 3)
    numbers = ScalaBLRegressor(classifier(num_labels=1), **own | {"windows": "probs"})
    with pytest.raises(ValueError, match="windows='probs' needs one class per row"):
        numbers.fit(texts, LABELS.double().numpy())


def test_the_command_line_reads_windows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.classifier().save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    pd.DataFrame(ROWS).assign(label=["a", "b", "c", "a", "b"]).to_csv("train.csv", index=False)
    words = ["fit", "train.csv", "--model", "base", "--num-steps", "2", "--device", "cpu", "--out", "post"]
    code = cli.main([*words, "--max-length", "6", "--windows", "probs", "--overlap", "2"])
    assert code == 0, capsys.readouterr().err
    capsys.readouterr()
    assert cli.main(["predict", "post", "train.csv", "--model", "base", "--out", "found.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5 and len(pd.read_csv("found.csv")) == 5
    loaded = sp.Posterior.from_pretrained(tiny.classifier(), "post")
    assert (loaded.task.windows, loaded.task.overlap, loaded.task.max_length) == ("probs", 2, 6)
    assert cli.main([*words[:-1], "other", "--overlap", "2"]) == 1
    assert "has no effect without windows" in capsys.readouterr().err


def test_the_service_answers_with_the_predictions_of_the_posterior():
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from scalabl_pyro.integrations import make_app

    posterior = posterior_of(task_of("probs", 1))
    rows = [{"text": row["text"]} for row in ROWS]
    with TestClient(make_app(posterior, num_draws=4)) as client:
        found = client.post("/predict", json={"rows": rows}).json()
    expected = posterior.predict(rows, num_draws=4, seed=0).probs
    assert [line["probability"] for line in found["predictions"]] == pytest.approx(expected.max(1).tolist(), abs=1e-9)
