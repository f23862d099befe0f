"""Rows with several labels in what is built on predictions: tables, held-out rows, program, service, Trainer."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import tiny
from transformers import TrainingArguments

import scalabl_pyro as sp
from scalabl_pyro import tasks
from scalabl_pyro.cli import main as cli
from scalabl_pyro.integrations import ScalaBLTrainer
from scalabl_pyro.integrations.service.answers import predicted

ROWS = [{"text": row["text"], "labels": [["a"], ["a", "b"], []][i % 3]} for i, row in enumerate(tiny.text_rows(12))]
FEW = {"num_steps": 4, "batch_size": 4, "progress": False}


def parts():
    task = tasks.MultiLabelClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    return sp.bayesian_lora(tiny.classifier(num_labels=3), r=2), task


@pytest.fixture(scope="module")
def posterior():
    return sp.fit(*parts(), ROWS, **FEW).posterior


def test_a_table_has_the_rows_and_tells_which_need_a_review(posterior):
    found = posterior.predict(ROWS, num_draws=3)
    frame = found.to_frame(pd.DataFrame(ROWS, index=range(5, 17)), review_above=0.9)
    assert frame.index[0] == 5 and list(frame.columns[:2]) == ["text", "labels"]
    assert (frame["needs_review"] == (1 - frame["probability"] > 0.9)).all()


def test_held_out_rows_have_the_scores_of_a_prediction_and_new_labels_are_named():
    held_out = [*ROWS[:5], {"text": "the sea", "labels": ["c"]}]
    with pytest.warns(sp.ScalaBLWarning) as warned:
        result = sp.fit(*parts(), ROWS, eval_data=held_out, eval_every=2, seed=3, **FEW)
    assert any("eval_data has answers that no row of train_data has: 'c' (1 row)" in str(w.message) for w in warned)
    table = result.posterior.predict(held_out, num_draws=8, seed=3).metrics().loc["value"]
    last = result.history.iloc[-1]
    assert last["eval_nll"] == pytest.approx(table["nll"], rel=1e-6)
    assert last["eval_accuracy"] == pytest.approx(table["accuracy"])
    assert not {"eval_ece", "eval_rmse"} & set(result.history)


def test_the_program_predicts_and_reports_them(posterior, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.classifier(num_labels=3).save_pretrained("base")
    posterior.save_pretrained("post")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = ["post", "rows.jsonl", "--model", "base", "--num-draws", "3", "--device", "cpu", "--json"]
    assert cli.main(["predict", *words, "--review-above", "0.9"]) == 0
    found = json.loads(capsys.readouterr().out)["predictions"]
    expected = posterior.predict(ROWS, num_draws=3).to_frame()
    assert [row["prediction"] for row in found] == expected["prediction"].tolist()
    assert [row["labels"] for row in found] == [row["labels"] for row in ROWS]
    assert cli.main(["evaluate", *words, "--out", "r.html", "--bootstrap", "20"]) == 0
    assert "Most doubtful rows" in (tmp_path / "r.html").read_text()


def test_the_service_answers_with_the_labels(posterior):
    prediction = posterior.predict(ROWS, num_draws=3)
    lines = predicted(prediction, posterior.task, [], level=0.9)
    frame = prediction.to_frame()
    assert [line["prediction"] for line in lines] == frame["prediction"].tolist()
    np.testing.assert_allclose([line["p(a)"] for line in lines], frame["p(a)"])


def test_a_trainer_evaluates_them(tmp_path):
    blora, task = parts()
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    trainer = ScalaBLTrainer(blora, task, args=args, train_dataset=ROWS, eval_dataset=ROWS, num_draws=3)
    trainer.train()
    found = trainer.evaluate()
    table = trainer.posterior().predict(ROWS, num_draws=3, seed=args.seed).metrics().loc["value"]
    assert found["eval_nll"] == pytest.approx(table["nll"], rel=1e-5)
    assert found["eval_brier"] == pytest.approx(table["brier"], rel=1e-5) and math.isfinite(found["eval_loss"])
