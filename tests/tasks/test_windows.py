"""Texts longer than the model reads: windows combined in the likelihood, held against a hand computation."""

import itertools

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from completions import adapted
from stock import train_with_stock_svi

import scalabl_pyro as sp
from scalabl_pyro import tasks
from scalabl_pyro._process.random_state import derive_seed
from scalabl_pyro.data import TrainingBatches, collate
from scalabl_pyro.tasks.windows import combine, split_windows, windows_of

EXACT = {"rtol": 0, "atol": 1e-10}
CLASSES = ["a", "b", "c"]
#: From 5 to 23 words, which are tokens.
TEXTS = [" ".join(["the sky is blue and the grass is green"] * 3)[: 18 + 19 * i] for i in range(5)]
ROWS = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
SIZE = 6


def task_of(rule="logits", overlap=0, **options):
    own = {"classes": CLASSES, "max_length": SIZE, "windows": rule, "overlap": overlap}
    return sp.SequenceClassification(tiny.tokenizer(), **own | options)


def classifier(family="llama", num_labels=3):
    return tiny.classifier(family, num_labels=num_labels, dtype=torch.float64)


def posterior_of(task, rows=ROWS, family="llama", **options):
    blora = sp.bayesian_lora(classifier(family))
    few = {"num_steps": 3, "batch_size": 3, "progress": False, "lr": 3e-2, "lr_A": 1e-2}
    return sp.fit(blora, task, rows, **few | options).posterior


def by_hand(posterior, rows, rule, overlap, num_draws):
    """(S, N, C) log probabilities: each window alone through the plain model, then the formula."""
    tokenizer, found = tiny.tokenizer(), []
    draws = posterior.sample(num_draws, seed=0)
    llm = posterior.llm()
    for row in rows:
        ids = tokenizer(row["text"]).input_ids
        parts, start = [], 0
        while True:
            parts.append(ids[start : start + SIZE])
            if start + SIZE >= len(ids):
                break
            start += SIZE - overlap
        weights = torch.tensor([len(part) for part in parts], dtype=torch.float64)
        weights = weights / weights.sum()
        each = torch.stack(
            [
                llm(
                    input_ids=torch.tensor([part]), attention_mask=torch.ones(1, len(part)), s=draws.s.unsqueeze(1)
                ).logits
                for part in parts
            ]
        )[:, :, 0]  # (W, S, C)
        if rule == "logits":
            found.append((weights[:, None, None] * each).sum(0).log_softmax(-1))
        else:
            found.append((weights[:, None, None] * each.softmax(-1)).sum(0).log())
    return torch.stack(found, 1)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("rule", ["logits", "probs"])
@torch.no_grad()
def test_predictions_are_those_of_the_formula(rule, overlap, family):
    posterior = posterior_of(task_of(rule, overlap), family=family)
    expected = by_hand(posterior, ROWS, rule, overlap, num_draws=3)
    for size in (1, 5):
        found = posterior.predict(ROWS, num_draws=3, seed=0, batch_size=size)
        np.testing.assert_allclose(found.log_probs, expected.numpy(), **EXACT)
    order = [3, 0, 4]
    few = posterior.predict([ROWS[i] for i in order], num_draws=3, seed=0)
    np.testing.assert_allclose(few.log_probs, expected.numpy()[:, order], **EXACT)


def test_texts_that_fit_are_read_as_without_windows(unchanged_rng):
    rows = [{"text": "the sky is blue", "label": i % 3} for i in range(3)]
    expected = posterior_of(task_of(None), rows).predict(rows, num_draws=3).log_probs
    for rule in ("logits", "probs"):
        found = posterior_of(task_of(rule), rows).predict(rows, num_draws=3).log_probs
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("stock_pyro")
def test_fit_is_stock_svi_and_a_row_is_one_observation():
    def adapt():
        return adapted(classifier(), target_modules=["q_proj"], r=2)

    seed, size, steps = 4, 3, 4
    options = {"lr_scale": 1e-2, "schedule": "constant", "warmup": 0.0}
    rates = {"lr": 1e-2, "lr_A": 1e-2, "optimizer": options}
    fitted = sp.fit(
        adapt(), task_of("probs", 1), ROWS, num_steps=steps, batch_size=size, seed=seed, progress=False, **rates
    ).posterior
    assert fitted.provenance["num_data"] == len(ROWS)
    twin, task = adapt(), task_of("probs", 1)
    guide = sp.guides.as_guide("normal", twin, seed=derive_seed(seed, "initial scales"))
    batches = TrainingBatches([task.encode(row) for row in ROWS], size, task.pad_token_id, seed=seed)
    train_with_stock_svi(twin, task, guide, batches, num_data=len(ROWS), steps=steps, seed=seed)
    torch.testing.assert_close(fitted.guide.loc, guide.loc.data, **EXACT)
    for (A, B), (own_A, own_B) in zip(fitted.factors, twin.adapter.factors(), strict=True):
        torch.testing.assert_close(A, own_A.data / own_A.data.norm(dim=1, keepdim=True), **EXACT)
        torch.testing.assert_close(B, own_B.data, **EXACT)


def test_micro_batches_and_checkpointing_change_nothing():
    def learned(hardware, **options):
        blora = sp.bayesian_lora(classifier(), layers_to_transform=[1], **options)
        sp.fit(blora, task_of("probs", 1), ROWS, num_steps=4, batch_size=4, hardware=hardware, progress=False)
        return torch.cat([factor.flatten() for pair in blora.adapter.factors() for factor in pair])

    expected = learned({})
    for hardware in ({"micro_batch_size": 1}, {"gradient_checkpointing": True}):
        torch.testing.assert_close(learned(hardware), expected, **EXACT)


def test_a_posterior_with_windows_comes_back_and_old_ones_have_none(tmp_path):
    posterior = posterior_of(task_of("probs", 2))
    posterior.save_pretrained(tmp_path)
    loaded = sp.Posterior.from_pretrained(classifier(), tmp_path)
    assert (loaded.task.windows, loaded.task.overlap) == ("probs", 2)
    np.testing.assert_array_equal(loaded.predict(ROWS).log_probs, posterior.predict(ROWS).log_probs)
    assert "windows='probs'" in repr(loaded.task) and "overlap" not in repr(task_of(None))
    options = {"classes": CLASSES, "text": "text", "text_pair": None, "target": "label", "max_length": None}
    assert tasks.from_options("SequenceClassification", tiny.tokenizer(), options).windows is None


def test_other_likelihoods_average_the_outputs():
    blora = sp.bayesian_lora(classifier(num_labels=1))
    rows = [{**row, "label": float(row["label"])} for row in ROWS]
    task = sp.Regression(tiny.tokenizer(), max_length=SIZE, windows="logits", noise_scale=1.0, standardize=False)
    posterior = sp.fit(blora, task, rows, num_steps=2, progress=False).posterior
    found = posterior.predict(rows, num_draws=2, seed=0).means
    draws, llm = posterior.sample(2, seed=0), posterior.llm()
    for n, row in enumerate(rows):
        ids = tiny.tokenizer()(row["text"]).input_ids
        parts = [ids[i : i + SIZE] for i in range(0, len(ids), SIZE)]
        with torch.no_grad():
            each = [
                llm(input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p)), s=draws.s.unsqueeze(1)).logits
                for p in parts
            ]
        expected = sum(len(p) / len(ids) * out[:, 0, 0] for p, out in zip(parts, each, strict=True))
        np.testing.assert_allclose(found[:, n], expected.numpy(), **EXACT)


def test_every_token_is_read_and_windows_overlap_as_asked():
    tokenizer, text = tiny.tokenizer(), TEXTS[-1]
    ids = tokenizer(text).input_ids
    assert windows_of(tokenizer, text, SIZE, 0)["input_ids"] == ids
    found = windows_of(tokenizer, text, SIZE, 2)["input_ids"]
    parts = [found[i : i + SIZE] for i in range(0, len(found), SIZE)]
    assert all(a[-2:] == b[:2] for a, b in itertools.pairwise(parts))
    assert parts[0] + [token for part in parts[1:] for token in part[2:]] == ids


def test_windows_of_a_batch_have_their_lengths_and_no_empty_attention():
    task = task_of()
    examples = [task.encode(row) for row in ROWS]
    batch = collate(examples, range(5), task.pad_token_id)
    rows, lengths = split_windows(batch, SIZE, task.pad_token_id)
    assert lengths.sum(1).tolist() == [len(example) for example in examples]
    whole = [example.inputs["input_ids"] for example in examples]
    expected = [ids[i : i + SIZE] for ids in whole for i in range(0, len(ids), SIZE)]
    real = rows.inputs["input_ids"][lengths.flatten() > 0]
    masks = rows.inputs["attention_mask"][lengths.flatten() > 0]
    assert [row[mask.bool()].tolist() for row, mask in zip(real, masks, strict=True)] == expected
    assert rows.inputs["attention_mask"].sum(1).min() == 1


def test_the_two_rules_differ_where_one_window_is_sure():
    outputs = torch.tensor([[8.0, 0.0], [0.0, 0.3], [0.0, 0.3]])
    found = {rule: combine(outputs, torch.tensor([[5, 5, 5]]), rule).softmax(-1)[0, 0] for rule in ("logits", "probs")}
    assert found["logits"] > 0.9 and 0.5 < found["probs"] < 0.7  # two windows that know little keep their say


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"windows": "mean"}, r"windows='mean'"),
        ({"overlap": -1}, "overlap=-1 must be a whole number"),
        ({"overlap": 1.5}, "overlap=1.5 must be a whole number"),
        ({"overlap": SIZE}, "overlap=6 must be smaller than max_length=6"),
        ({"max_length": None}, "needs max_length="),
        ({"windows": None, "overlap": 2}, "has no effect without windows"),
        ({"text_pair": "other"}, "reads one text"),
    ],
    ids=range(7),
)
def test_options_that_cannot_be_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        task_of(**options)


@pytest.mark.parametrize("make", [
    lambda **o: tasks.OrderedClassification(tiny.tokenizer(), classes=[1, 2, 3], **o),
    lambda **o: sp.Regression(tiny.tokenizer(), **o),
    lambda **o: tasks.CountRegression(tiny.tokenizer(), **o),
    lambda **o: tasks.MultiLabelClassification(tiny.tokenizer(), classes=CLASSES, **o),
], ids=["ordered", "numbers", "counts", "labels"])  # fmt: skip
def test_probabilities_of_other_answers_cannot_be_averaged(make):
    with pytest.raises(ValueError, match="windows='probs' needs one class per row: use windows='logits'"):
        make(windows="probs", max_length=4)
    assert make(windows="logits", max_length=4).windows == "logits"


def test_a_model_that_reads_few_positions_reads_long_texts_in_windows():
    llm = tiny.classifier("bert", num_labels=3)
    limit = llm.config.max_position_embeddings
    rows = pd.DataFrame({"text": ["the sky is blue " * limit, "the sky"], "label": [0, 1]})
    blora = sp.bayesian_lora(llm)
    plain = sp.SequenceClassification(tiny.tokenizer(), classes=CLASSES)
    with pytest.raises(ValueError, match="max_length"):
        sp.fit(blora, plain, rows, num_steps=1, progress=False)
    task = sp.SequenceClassification(tiny.tokenizer(), classes=CLASSES, max_length=limit, windows="probs")
    posterior = sp.fit(blora, task, rows, num_steps=1, progress=False).posterior
    assert posterior.predict(rows, num_draws=2).to_frame(rows)["probability"].between(0, 1).all()
