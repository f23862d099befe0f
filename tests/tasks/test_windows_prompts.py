"""Long texts in the prompts of causal LMs: windows, held against a hand computation with one prompt per piece."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro import tasks
from scalabl_pyro.cli.main import main
from scalabl_pyro.data import collate
from scalabl_pyro.tasks.long_prompts import split_prompts

EXACT = {"rtol": 0, "atol": 1e-10}
CLASSES = ["blue sky", "green", "the grass is"]
#: From 3 to 18 words, which are tokens.
TEXTS = [
    " ".join((["the", "sky", "is", "blue", "red", "the", "grass", "is", "green"] * 2)[: 3 + 4 * i]) for i in range(5)
]
TEMPLATE = "the {text} is"
NAMED = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
ASKED = [
    {"question": text, "choices": ["red", "blue", "green"][: 2 + i % 2], "answer": i % 2}
    for i, text in enumerate(TEXTS)
]
SIZE = 8


def named(rule="logits", overlap=0, **options):
    own = {"classes": CLASSES, "template": TEMPLATE, "chat": False, "max_length": SIZE}
    return tasks.LabelCompletion(tiny.tokenizer(), **own | {"windows": rule, "overlap": overlap} | options)


def asked(rule="logits", overlap=0, **options):
    own = {"labels": ["A", "B", "C"], "template": "the {question} is", "chat": False, "max_length": SIZE}
    return sp.MultipleChoice(tiny.tokenizer(), **own | {"windows": rule, "overlap": overlap} | options)


def causal_lm():
    return tiny.causal_lm(dtype=torch.float64)


def posterior_of(task, rows, **options):
    blora = sp.bayesian_lora(causal_lm())
    few = {"num_steps": 3, "batch_size": 3, "progress": False, "lr": 3e-2, "lr_A": 1e-2}
    return sp.fit(blora, task, rows, **few | options).posterior


def pieces(text, room, overlap):
    words, start, found = text.split(), 0, []
    while True:
        found.append(words[start : start + room])
        if start + room >= len(words):
            return found
        start += room - overlap


def answer_logits(posterior, task, prompt, s):
    """(S, C) numbers of one prompt, by the plain model."""
    tokenizer, llm = tiny.tokenizer(), posterior.llm()
    ids = tokenizer(prompt).input_ids

    def logits(tokens):
        tokens = torch.tensor([tokens])
        return llm(input_ids=tokens, attention_mask=torch.ones_like(tokens), s=s.unsqueeze(1)).logits[:, 0]

    if isinstance(task, sp.MultipleChoice):
        return logits(ids)[:, -1, task.label_ids]
    scores = []
    for name in CLASSES:
        label = tokenizer(name, add_special_tokens=False).input_ids
        found = logits(ids + label).log_softmax(-1)[:, len(ids) - 1 : -1]
        scores.append(found.gather(-1, torch.tensor(label).expand(len(s), 1, -1).transpose(1, 2)).sum((1, 2)))
    return torch.stack(scores, -1)


def by_hand(posterior, task, rows, rule, overlap):
    draws, found = posterior.sample(3, seed=0).s, []
    for row in rows:
        text = row.get("text", row.get("question"))
        whole = tiny.tokenizer()(f"the {text} is").input_ids
        room = SIZE - (len(whole) - len(text.split()))
        parts = pieces(text, room, overlap) if len(whole) > SIZE else [text.split()]
        weights = torch.tensor([len(part) for part in parts], dtype=torch.float64)
        weights = (weights / weights.sum())[:, None, None]
        each = torch.stack([answer_logits(posterior, task, f"the {' '.join(part)} is", draws) for part in parts])
        if "choices" in row:
            each[..., len(row["choices"]) :] = -torch.inf
        if rule == "logits":
            found.append((weights * each).sum(0).log_softmax(-1))
        else:
            found.append((weights * each.softmax(-1)).sum(0).log())
    return torch.stack(found, 1)


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("rule", ["logits", "probs"])
@pytest.mark.parametrize(("make", "rows"), [(named, NAMED), (asked, ASKED)], ids=["names", "letters"])
@torch.no_grad()
def test_predictions_are_those_of_the_formula(make, rows, rule, overlap):
    task = make(rule, overlap)
    posterior = posterior_of(task, rows)
    expected = by_hand(posterior, task, rows, rule, overlap).numpy()
    for size in (1, 5):
        found = posterior.predict(rows, num_draws=3, seed=0, batch_size=size)
        np.testing.assert_allclose(found.log_probs, expected, **EXACT)
    order = [3, 0, 4]
    few = posterior.predict([rows[i] for i in order], num_draws=3, seed=0)
    np.testing.assert_allclose(few.log_probs, expected[:, order], **EXACT)


@pytest.mark.parametrize(("make", "rows"), [(named, NAMED), (asked, ASKED)], ids=["names", "letters"])
def test_texts_that_fit_are_read_as_without_windows(make, rows):
    short = [{**row, "text": "the sky", "question": "the sky"} for row in rows]
    expected = posterior_of(make(None), short).predict(short, num_draws=3).log_probs
    for rule in ("logits", "probs"):
        np.testing.assert_array_equal(posterior_of(make(rule), short).predict(short, num_draws=3).log_probs, expected)


@pytest.mark.parametrize("rule", ["logits", "probs"])
@pytest.mark.parametrize(("make", "rows"), [(named, NAMED), (asked, ASKED)], ids=["names", "letters"])
def test_micro_batches_and_padding_change_nothing(make, rows, rule):
    def learned(**options):
        # 32 latents: torch makes the same noise of each row, whatever rows are drawn together
        blora = sp.bayesian_lora(causal_lm(), target_modules=["q_proj", "v_proj"])
        sp.fit(blora, make(rule, 1), rows, num_steps=4, batch_size=4, progress=False, **options)
        return torch.cat([factor.flatten() for pair in blora.adapter.factors() for factor in pair])

    expected = learned()
    assert expected.isfinite().all()  # also where a row has fewer choices than the task has labels
    for hardware in ({"micro_batch_size": 1}, {"gradient_checkpointing": True}):
        torch.testing.assert_close(learned(hardware=hardware), expected, **EXACT)


@pytest.mark.parametrize("multiple", [1, 16])
def test_each_window_is_a_whole_prompt_and_no_token_of_the_text_is_lost(multiple):
    tokenizer, task = tiny.tokenizer(), named("logits", 1)
    examples = [task.encode(row) for row in NAMED]
    batch = collate(examples, range(5), task.pad_token_id, multiple=multiple)
    rows, weights = split_prompts(batch, SIZE, task.pad_token_id)
    read = [[] for _ in NAMED]
    for i, (ids, last) in enumerate(zip(rows.inputs["input_ids"], rows.last, strict=True)):
        n, w = divmod(i, weights.shape[1])
        count = weights[n, w].item()
        if not count:
            assert rows.inputs["attention_mask"][i].sum() == 1
            continue
        assert rows.inputs["attention_mask"][i].sum() == last + 1 and rows.index[i] == n
        words = tokenizer.decode(ids[: last + 1], skip_special_tokens=True).split()
        assert words[0] == "the" and words[-1] == "is"
        if len(examples[n].extras["window_tokens"]) > 1:  # one window needs no weight
            assert len(words) - 2 == count
        read[n] += words[1:-1] if not w else words[2:-1]  # windows after the first one repeat one token
    assert [" ".join(words) for words in read] == TEXTS


def test_a_posterior_with_windows_comes_back_and_old_files_have_none(tmp_path):
    for task, rows in ((named("probs", 2), NAMED), (asked("probs", 2), ASKED)):
        posterior, path = posterior_of(task, rows), tmp_path / type(task).__name__
        posterior.save_pretrained(path)
        loaded = sp.Posterior.from_pretrained(causal_lm(), path)
        assert (loaded.task.windows, loaded.task.overlap, loaded.task.max_length) == ("probs", 2, SIZE)
        np.testing.assert_array_equal(loaded.predict(rows).log_probs, posterior.predict(rows).log_probs)
        assert "windows='probs'" in repr(loaded.task)
        saved = json.loads((path / "scalabl_config.json").read_text())["task"]["options"]
        options = {name: value for name, value in saved.items() if name not in ("windows", "overlap")}
        assert tasks.from_options(type(task).__name__, tiny.tokenizer(), options).windows is None


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (named, {"rule": "mean"}, "windows='mean'"),
        (asked, {"rule": None, "overlap": 2}, "has no effect without windows"),
        (asked, {"max_length": None}, "needs max_length="),
        (named, {"overlap": SIZE}, "must be smaller than max_length"),
    ],
    ids=range(4),
)
def test_options_that_cannot_be_are_refused(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(**options)


@pytest.mark.parametrize(("make", "rows"), [(named, NAMED), (asked, ASKED)], ids=["names", "letters"])
def test_a_window_without_room_for_its_text_is_refused(make, rows):
    with pytest.raises(ValueError, match=r"leaves no room for the (text|question). Increase max_length"):
        make("logits", max_length=2).encode(rows[-1])
    with pytest.raises(ValueError, match=r"of a prompt for its (text|question), which must be more than overlap=6"):
        make("logits", 6).encode(rows[-1])


@pytest.mark.parametrize(("make", "rows"), [(named, NAMED), (asked, ASKED)], ids=["names", "letters"])
def test_a_model_that_reads_few_positions_reads_long_texts_in_windows(make, rows):
    llm = tiny.causal_lm("gpt2")
    limit = llm.config.max_position_embeddings
    field = "text" if "text" in rows[0] else "question"
    long = [{**row, field: f"{row[field]} " * limit} for row in rows[:2]]
    blora = sp.bayesian_lora(llm)
    with pytest.raises(ValueError, match="max_length"):
        sp.fit(blora, make(None, max_length=None), long, num_steps=1, progress=False)
    task = make("probs", max_length=limit - 4)
    posterior = sp.fit(blora, task, long, num_steps=1, progress=False).posterior
    assert np.isfinite(posterior.predict(long, num_draws=2).log_likelihood).all()


def test_laplace_loo_held_out_rows_and_memory_take_windows():
    posterior = posterior_of(
        named("probs", 1), NAMED, eval_data=[{"text": TEXTS[-1] + " green", "label": 0}], eval_every=1
    )
    assert np.isfinite(sp.laplace(posterior, NAMED).predict(NAMED, num_draws=2).log_probs).all()
    assert np.isfinite(posterior.loo(NAMED, num_draws=25).elpd)
    blora = sp.bayesian_lora(causal_lm())
    whole = blora.estimate_memory(NAMED[-1:] * 8, task=named(None, max_length=None)).total
    assert blora.estimate_memory(NAMED[-1:] * 8, task=named()).total > 0.5 * whole


def test_the_command_line_reads_long_texts_with_a_causal_lm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.causal_lm().save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    pd.DataFrame(NAMED).assign(label=["blue", "green", "red", "blue", "green"]).to_csv("train.csv", index=False)
    words = ["fit", "train.csv", "--model", "base", "--num-steps", "2", "--device", "cpu", "--out", "post"]
    assert main([*words, "--max-length", "12", "--windows", "probs", "--overlap", "2"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["predict", "post", "train.csv", "--model", "base", "--out", "found.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5
    assert sp.Posterior.from_pretrained(tiny.causal_lm(), "post").task.windows == "probs"
