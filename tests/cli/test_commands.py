"""``scalabl-pyro predict``, ``evaluate`` and ``export`` do what the library does, and say what is wrong in one line."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.cli import main as cli
from scalabl_pyro.cli.report_words import MEANING
from scalabl_pyro.prediction.label_sets import LabelSetPrediction

ROWS = [{**row, "id": i} for i, row in enumerate(tiny.question_rows(12))]
NUMBERS = [{"text": row["question"], "label": float(i % 3)} for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, a posterior of classes and one of numbers, and their rows."""
    here = tmp_path_factory.mktemp("files")
    tiny.causal_lm().save_pretrained(here / "base")
    blora = sp.bayesian_lora(tiny.causal_lm())
    task = sp.MultipleChoice(tiny.tokenizer())
    sp.fit(blora, task, ROWS, num_steps=3, batch_size=4, progress=False).posterior.save_pretrained(here / "post")
    tiny.classifier(num_labels=1).save_pretrained(here / "base-numbers")
    numbers = sp.bayesian_lora(tiny.classifier(num_labels=1))
    task = sp.Regression(tiny.tokenizer())
    fitted = sp.fit(numbers, task, NUMBERS, num_steps=3, batch_size=4, progress=False).posterior
    fitted.save_pretrained(here / "post-numbers")
    for name, rows in (("rows", ROWS), ("numbers", NUMBERS)):
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return here


@pytest.fixture
def run(folder, capsys, monkeypatch):
    def here(*words):
        monkeypatch.chdir(folder)
        code = cli.main([*map(str, words)])
        found = capsys.readouterr()
        return code, found.out, found.err

    return here


def expected(folder, **options):
    posterior = sp.Posterior.from_pretrained(tiny.causal_lm(), folder / "post")
    return posterior.predict(ROWS, **options)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "jsonl"])
def test_predict_writes_the_table_that_the_library_makes(run, folder, ending):
    out = folder / f"found.{ending}"
    words = ["predict", "post", "rows.jsonl", "--model", "base", "--out", out, "--num-draws", 4, "--seed", 2]
    code, said, _ = run(*words, "--class-probs", "--review-above", 0.5)
    assert code == 0 and said.startswith(f"12 rows predicted: {out}\n")
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet, "tsv": lambda p: pd.read_csv(p, sep="\t")}
    found = read.get(ending, lambda p: pd.read_json(p, lines=True))(out)
    own = expected(folder, num_draws=4, seed=2).to_frame(ROWS, class_probs=True, review_above=0.5)
    assert list(found.columns) == list(own.columns)
    np.testing.assert_allclose(found["probability"], own["probability"], rtol=1e-6)
    assert found["needs_review"].tolist() == own["needs_review"].tolist()
    assert f"{own['needs_review'].sum()} of 12 rows need a review." in said
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # no half-written file


def test_predict_shows_the_table_or_gives_json(run, folder):
    code, said, _ = run("predict", "post", "rows.jsonl", "--model", "base", "--num-draws", 0)
    assert code == 0 and "probability" in said
    code, said, _ = run("predict", "post", "rows.jsonl", "--model", "base", "--num-draws", 0, "--json")
    own = expected(folder, num_draws=0).to_frame(ROWS)
    assert code == 0
    assert [row["id"] for row in json.loads(said)["predictions"]] == list(range(12))
    np.testing.assert_allclose([row["total"] for row in json.loads(said)["predictions"]], own["total"], rtol=1e-6)


@pytest.mark.parametrize("ending", ["html", "md"])
def test_the_report_has_the_metrics_the_pictures_and_the_rows_to_look_at(run, folder, ending):
    out = folder / f"report.{ending}"
    code, said, _ = run(
        "evaluate", "post", "rows.jsonl", "--model", "base", "--num-draws", 4, "--bootstrap", 50, "--out", out
    )
    table = expected(folder, num_draws=4).metrics(bootstrap=50)
    assert code == 0 and f"{table.loc['value', 'nll']:.3f}" in said and str(out) in said
    text = out.read_text()
    for title in (
        "In short",
        "Metrics",
        "Reliability",
        "Selective prediction",
        "Each class",
        "Confusion",
        "Most doubtful rows",
    ):
        assert title in text
    assert "What the columns mean" in text and "the draws disagree" in text and "need" not in said
    assert f"{table.loc['low', 'accuracy']:.3f}" in text and ROWS[0]["question"] in text
    assert "Expected calibration error: mean gap" in text and "ends of a 95 % interval" in text
    pictures = (
        re.findall(r"data:image/png;base64,", text) if ending == "html" else list(folder.glob("report_pic*/*.png"))
    )
    assert len(pictures) == 2 and "<script" not in text


def test_the_report_says_what_a_limit_of_doubt_does(run, folder):
    out = folder / "limit.md"
    words = ("evaluate", "post", "rows.jsonl", "--model", "base", "--num-draws", 4, "--bootstrap", 0, "--out", out)
    code, said, _ = run(*words, "--review-above", 0.4)
    frame = expected(folder, num_draws=4).to_frame(review_above=0.4)
    alone = frame[~frame["needs_review"]]
    wrong = 100 * (alone["prediction"] != alone["target"]).mean()
    count = f"At the limit 0.4, the model answers {len(alone)} of {len(frame)} rows"
    for text in (said, out.read_text()):
        assert count in text and (alone.empty or f"{wrong:.1f} % of these answers are wrong" in text)
    assert "a person reads rows with a doubt above | 0.4" in out.read_text()
    code, said, _ = run(*words, "--review-above", 0.4, "--json")
    assert code == 0 and count in json.loads(said)["in_short"][-1]
    code, _, error = run(*words, "--review-above", 30)
    assert code == 1 and "above 1, the largest doubt" in error


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_terminal_shows_how_far_a_prediction_is(run, monkeypatch, command, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    code, _, error = run(command, "post", "rows.jsonl", "--model", "base", "--num-draws", 2)
    assert code == 0 and ("predict: 100%" in error) == is_terminal
    _, _, error = run(command, "post", "rows.jsonl", "--model", "base", "--num-draws", 2, "--json")
    assert "100%" not in error


def test_a_report_of_numbers(run, folder):
    code, said, _ = run(
        "evaluate", "post-numbers", "numbers.jsonl", "--model", "base-numbers", "--bootstrap", 20, "--out", "n.html"
    )
    assert code == 0 and "rmse" in said
    assert "Surprising rows" in (folder / "n.html").read_text()


def test_every_metric_of_a_report_has_its_meaning(folder):
    labels = LabelSetPrediction(np.zeros((2, 3, 2)), np.zeros((2, 3)), np.array([[1, 0]] * 3), ("a", "b"))
    numbers = sp.NumericPrediction(
        np.zeros((2, 3)), np.ones((2, 3)), np.zeros((2, 3)), np.zeros((2, 3)), np.zeros(3), is_normal=True
    )
    for found in (expected(folder, num_draws=2), labels, numbers):
        assert set(found.metrics().columns) <= set(MEANING)


def test_the_report_shows_texts_of_rows_as_texts(run, folder):
    rows = [{**row, "note": "<script>alert(1)</script> | a\nb"} for row in ROWS]
    (folder / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("odd.html", "odd.md"):
        assert run("evaluate", "post", "odd.jsonl", "--model", "base", "--num-draws", 0, "--out", name)[0] == 0
        text = (folder / name).read_text()
        assert "<script>" not in text and "&lt;script&gt;alert(1)" in text
    assert "\\| a b" in (folder / "odd.md").read_text()


def test_evaluate_gives_metrics_as_json(run, folder):
    code, said, _ = run("evaluate", "post", "rows.jsonl", "--model", "base", "--num-draws", 4, "--json")
    found = json.loads(said)["metrics"]
    assert code == 0
    assert found["value"]["nll"] == pytest.approx(expected(folder, num_draws=4).metrics().loc["value", "nll"])
    assert found["low"]["ece"] is None  # has no interval


def test_export_writes_adapters(run, folder):
    code, said, _ = run("export", "post", "adapters", "--model", "base", "--draws", 2, "--json")
    assert code == 0 and [Path(p).name for p in json.loads(said)["adapters"]] == ["draw-0", "draw-1"]
    assert (folder / "adapters" / "draw-1" / "adapter_config.json").exists()
    assert run("export", "post", "adapters", "--model", "base")[0] == 1  # exists
    _, said, _ = run("export", "post", "one", "--model", "base")
    assert said == "1 adapter written:\n  one/mean\n"  # the path that was given


TABLES = {
    "classes": ({"note": [row["question"] for row in ROWS], "class": ["blue", "red", "green"] * 4}, "LabelCompletion"),
    "numbers": ({"note": [row["question"] for row in ROWS], "price": [0.5 * i for i in range(12)]}, "Regression"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_becomes_a_posterior_that_predicts_tables(run, folder, kind):
    columns, task = TABLES[kind]
    pd.DataFrame(columns).to_csv(folder / "train.csv", index=False)
    tiny.tokenizer().save_pretrained(folder / "base")
    words = ["--model", "base", "--out", f"new-{kind}", "--num-steps", 4, "--batch-size", 4, "--device", "cpu"]
    code, said, error = run("fit", "train.csv", *words)
    assert code == 0, error
    assert said.startswith(f"{task}: text in 'note', answer in") and "12 rows, 4 steps" in said
    pd.DataFrame({"note": columns["note"]}).to_csv(folder / "new.csv", index=False)
    code, said, error = run("predict", f"new-{kind}", "new.csv", "--model", "base", "--out", "found.csv", "--json")
    assert code == 0, error
    found = pd.read_csv(folder / "found.csv")
    assert json.loads(said)["rows"] == 12 and found["note"].tolist() == columns["note"]
    assert set(found["prediction"]) <= {"blue", "red", "green"} if kind == "classes" else found["sd"].gt(0).all()
    code, said, _ = run("evaluate", f"new-{kind}", "train.csv", "--model", "base", "--out", "r.html")
    assert code == 0 and "nll" in said
    code, _, error = run("fit", "train.csv", *words)
    assert code == 1 and "exists and is not empty" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "rows.jsonl", "--model", "no/such/missing-folder", "--out", "p"], "missing-folder"),
        (["fit", "none.csv", "--model", "base", "--out", "p"], "none.csv does not exist"),
        (["predict", "post", "rows.jsonl", "--model", "base", "--out", "x.pdf"], "--out x.pdf: the name must end in"),
        (["predict", "post", "rows.jsonl", "--model", "base", "--out", "no/x.csv"], "the folder no does not exist"),
        (["predict", "post", "none.jsonl", "--model", "base"], "none.jsonl does not exist"),
        (["predict", "nothing", "rows.jsonl", "--model", "base"], "nothing"),
        (["predict", "post", "rows.jsonl", "--model", "no/such/missing-folder"], "missing-folder"),
        (["predict", "post", "rows.jsonl", "--model", "base", "--num-draws", -1], "num_draws=-1"),
        (["evaluate", "post", "rows.jsonl", "--model", "base", "--out", "x.pdf"], "must end in .html or .md"),
        (["export", "post", "out", "--model", "base", "--draws", "many"], "--draws many: give a whole number"),
    ],
)
def test_what_is_wrong_stands_in_one_line(run, words, message):
    code, said, error = run(*words)
    assert code == 1 and not said
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_the_table_may_have_columns_with_the_names_of_the_result(run, folder):
    rows = [{"text": r["text"], "target": r["label"], "given_target": 7, "sd": "x"} for r in NUMBERS]
    pd.DataFrame(rows).to_csv(folder / "clash.csv", index=False)
    task = sp.Regression(tiny.tokenizer(), target="target")
    fitted = sp.fit(sp.bayesian_lora(tiny.classifier(num_labels=1)), task, rows, num_steps=2, progress=False)
    fitted.posterior.save_pretrained(folder / "post-clash")
    words = ("post-clash", "clash.csv", "--model", "base-numbers", "--num-draws", 2)
    assert run("predict", *words, "--out", "clash-out.csv")[0] == 0
    found = pd.read_csv(folder / "clash-out.csv")
    assert list(found.columns[:5]) == ["text", "given_given_target", "given_target", "given_sd", "prediction"]
    assert (found["given_given_target"] == found["target"]).all() and (found["given_target"] == 7).all()
    expected = fitted.posterior.predict(rows, num_draws=2, seed=0).to_frame()
    np.testing.assert_allclose(found[["prediction", "sd"]], expected[["prediction", "sd"]], rtol=1e-5)
    assert run("evaluate", *words, "--bootstrap", 5, "--out", "clash.html")[0] == 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_keeps_every_character(folder, encoding):
    text = 'sky\u00a0!\u200b\u2028 \U0001f468\u200d\U0001f469 \u00e9\t\x7f"\\'
    (folder / "odd-text.jsonl").write_text(json.dumps({**ROWS[0], "note": text}))
    words = ["predict", "post", "odd-text.jsonl", "--model", "base", "--num-draws", "0", "--json"]
    command = [sys.executable, "-m", "scalabl_pyro", *words]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    said = subprocess.run(command, cwd=folder, capture_output=True, check=True, env=environment).stdout
    assert json.loads(said)["predictions"][0]["note"] == text
    assert ("\u00e9".encode() in said) is (encoding == "utf-8")


def test_a_posterior_of_ordered_classes_is_loaded(run, folder):
    task = sp.tasks.OrderedClassification(tiny.tokenizer(), classes=[0.0, 1.0, 2.0])
    fitted = sp.fit(sp.bayesian_lora(tiny.classifier(num_labels=1)), task, NUMBERS, num_steps=2, progress=False)
    fitted.posterior.save_pretrained(folder / "post-ordered")
    words = ("post-ordered", "numbers.jsonl", "--model", "base-numbers", "--num-draws", 2)
    code, said, _ = run("predict", *words, "--json")
    own = fitted.posterior.predict(NUMBERS, num_draws=2, seed=0).to_frame()
    assert code == 0
    found = json.loads(said)["predictions"]
    np.testing.assert_allclose([row["probability"] for row in found], own["probability"], rtol=1e-5)
    code, _, error = run("predict", "post-ordered", "numbers.jsonl", "--model", "base")
    assert code in (0, 1) and "Traceback" not in error


def test_a_model_with_another_head_or_an_absent_device_is_named(run, folder):
    task = sp.SequenceClassification(tiny.tokenizer(), classes=[0.0, 1.0, 2.0])
    fitted = sp.fit(sp.bayesian_lora(tiny.classifier(num_labels=3)), task, NUMBERS, num_steps=2, progress=False)
    fitted.posterior.save_pretrained(folder / "post-three")
    words = ("predict", "post-three", "numbers.jsonl", "--model", "base-numbers")
    code, said, error = run(*words)
    assert code == 1 and not said and "base-numbers do not have the shapes that the posterior needs" in error
    for device in ("nothing", "cuda:99"):
        code, said, error = run(*words, "--device", device)
        assert code == 1 and error.startswith(f"error: --device {device} cannot be used (")


def test_ctrl_c_ends_a_command_with_one_line(run, monkeypatch):
    def stop(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["scalabl_pyro.cli.predict"], "predict_table", stop)
    code, said, error = run("predict", "post", "rows.jsonl", "--model", "base")
    assert (code, said, error) == (130, "", "stopped by Ctrl-C\n")


def test_rows_without_answers_cannot_be_evaluated(run, folder):
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    (folder / "open.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, error = run("evaluate", "post", "open.jsonl", "--model", "base")
    assert code == 1 and "no answers" in error


@pytest.mark.parametrize("command", ["", "fit", "predict", "evaluate", "export", "serve", "doctor"])
def test_the_program_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    assert f"usage: scalabl-pyro {command}".rstrip() in capsys.readouterr().out
    if command not in ("", "doctor"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command])
        assert ended.value.code == 2


def test_serve_answers_requests_with_the_numbers_of_predict(folder):
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "post", "--model", "base", "--port", str(port), "--num-draws", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "scalabl_pyro", *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.2)
        body = json.dumps({"rows": ROWS[:3]}).encode()
        request = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = json.load(answer)
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert "Traceback" not in said
    own = expected(folder, num_draws=3).to_frame()
    rows = found["predictions"] if "predictions" in found else found["rows"]
    np.testing.assert_allclose([row["probability"] for row in rows], own["probability"][:3], atol=1e-5)
