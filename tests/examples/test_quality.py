"""The benchmark of quality: runs that stop and go on, the split, batches of few shapes, and the sums of its report."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from benchmarks.quality import data, methods, options, report, runner, table
from benchmarks.quality.sources import SOURCES
from benchmarks.quality.table import Table

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMES = {"seconds", "train_seconds", "predict_seconds"}


def rows(count, start=0):
    """Different questions with an answer that a noun decides."""
    nouns = ["sky", "grass", "rose", "night"]
    return [
        {
            "question": f"what colour is the {nouns[i % 4]} {i // 100 % 10} {i // 10 % 10} {i % 10} ?",
            "choices": tiny.COLORS,
            "answer": i % 4,
        }
        for i in range(start, start + count)
    ]


@pytest.fixture
def command(tmp_path):
    """The arguments of a small benchmark, with a table of its own for each name."""
    for part, found in {"train": rows(40), "test": rows(12, start=100)}.items():
        lines = "\n".join(json.dumps(row) for row in found)
        (tmp_path / f"toy_{part}.jsonl").write_text(lines, encoding="utf-8")
    given = [f"--datasets=toy={tmp_path / 'toy_train.jsonl'},{tmp_path / 'toy_test.jsonl'}", "--device=cpu"]
    given += ["--train-rows=20", "--val-rows=10", "--steps=2", "--batch-size=4", "--rank=2", "--draws=2"]
    given += ["--methods", "mle", "tfb", "scalabl", "--set", 'tfb={"num_bisections": 2, "tolerance": 0.5}']
    return lambda name, *more: options.arguments(None, [*given, "--seeds", "0", "1", f"--out={tmp_path / name}", *more])


def run(args):
    return runner.run_all(args, tiny.causal_lm(), tiny.tokenizer())


def outcome(args):
    """The rows of a table, without what differs from run to run."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in Table(args.out).rows()]


@pytest.mark.slow
@pytest.mark.filterwarnings("default::scalabl_pyro.ScalaBLWarning")
def test_a_benchmark_that_was_killed_goes_on_and_ends_with_the_same_table(command, monkeypatch):
    whole, stopped = command("whole"), command("stopped")
    assert run(whole) == 0
    count = 0
    execute = runner.execute

    def killed_in_the_third_run(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return execute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "execute", killed_in_the_third_run)
        with pytest.raises(KeyboardInterrupt):
            run(stopped)
    lines = stopped.out / "table.jsonl"
    assert len(Table(stopped.out).rows()) == 2
    with lines.open("a", encoding="utf-8") as file:
        file.write('{"dataset": "toy", "meth')  # a line that was not written to its end
    assert run(stopped) == 0
    assert len(lines.read_text().splitlines()) == 6
    assert repr(outcome(stopped)) == repr(outcome(whole))  # NaN is equal to itself there
    before = lines.read_bytes()
    assert run(stopped) == 0
    assert lines.read_bytes() == before
    text = report.write(stopped.out)
    assert "| tfb | 2 |" in text and "| 6 |" not in text


@pytest.mark.filterwarnings("default::scalabl_pyro.ScalaBLWarning")
def test_shards_share_the_runs_and_keep_a_base_with_what_starts_from_it(command):
    for i in range(2):
        assert run(command("shared", f"--shard={i}/2")) == 0
    parts = [table.read(path) for path in sorted((command("shared").out).glob("table-*.jsonl"))]
    named = [{(row["method"], row["seed"]) for row in part} for part in parts]
    assert not named[0] & named[1] and len(named[0] | named[1]) == 6
    for part in named:
        assert {seed for method, seed in part if method == "mle"} == {seed for method, seed in part if method == "tfb"}


def test_other_settings_are_other_runs_and_lines(command):
    for more in ([], ["--lr", "0.01"]):
        assert run(command("two", "--methods", "mle", "--seeds", "0", *more)) == 0
    found = Table(command("two").out).rows()
    assert len(found) == 2
    assert report.frame_of(found)["line"].nunique() == 2


@pytest.mark.parametrize(("given", "expected"), [([], [None, 1e-3, None]), (["--lr=0.01"], [0.01, 0.01, 0.5])])
def test_each_method_learns_at_its_own_rate_unless_told_otherwise(command, monkeypatch, given, expected):
    rates = []
    for owner, name in (
        (methods.baselines, "mle"),
        (methods.baselines, "scalabl_released"),
        (sp, "fit"),
    ):
        train = getattr(owner, name)
        spy = lambda *args, train=train, **kw: rates.append(kw.get("lr")) or train(*args, **kw)  # noqa: E731
        monkeypatch.setattr(owner, name, spy)
    own = ["--set", 'scalabl={"lr": 0.5}'] if given else []
    names = ["--methods", "mle", "scalabl", "scalabl_released", "--seeds", "0"]
    assert run(command("rates", *names, *given, *own)) == 0
    assert sorted(rates, key=str) == sorted(expected, key=str)


def test_on_validation_test_rows_are_never_predicted_and_on_test_once(command, monkeypatch):
    seen = []
    predict = methods.Workbench.predict

    def watched(self, learned, asked, *, seed):
        seen.append({row["question"] for row in asked})
        return predict(self, learned, asked, seed=seed)

    monkeypatch.setattr(methods.Workbench, "predict", watched)
    test = {row["question"] for row in rows(12, start=100)}
    given = ["--methods", "mle", "--seeds", "0", "--split"]
    run(command("val", *given, "val"))
    assert len(seen) == 1 and not seen[0] & test
    seen.clear()
    run(command("test", *given, "test"))
    assert [asked == test for asked in seen] == [False, True]


def test_no_run_begins_that_would_not_end_in_time(command, monkeypatch):
    def slow(run, *_):
        time.sleep(0.2)
        return {"dataset": run.dataset, "method": run.method.name, "seed": run.seed, "split": "test", "settings": {}}

    monkeypatch.setattr(runner, "execute", slow)
    monkeypatch.setattr(runner, "describe", lambda row: "")
    args = command("timed", "--time-limit", "0.5")
    args.start = time.perf_counter()
    assert run(args) == 0
    assert 0 < len(Table(args.out).rows()) < 4


def test_a_training_that_diverges_is_a_row_and_a_bug_is_none(command, monkeypatch, capsys):
    def broken(run, *_):
        raise FloatingPointError("the loss is nan") if run.method.name == "mle" else RuntimeError("a bug")

    monkeypatch.setattr(runner, "execute", broken)
    args = command("broken", "--methods", "mle", "scalabl", "--seeds", "0")
    assert run(args) == 1
    (row,) = Table(args.out).rows()
    assert row["error"] == "the loss is nan"
    assert "a bug" in capsys.readouterr().err
    assert "**Failed:** toy, mle, seed 0: the loss is nan" in report.write(args.out)


def test_a_killed_writer_leaves_whole_rows(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from benchmarks.quality.table import Table\n"
        "t = Table(Path(sys.argv[2]))\n"
        "for seed in range(10**6):\n"
        "    t.append({'dataset': 'd', 'method': 'm', 'seed': seed, 'split': 'test', 'settings': {'x': 'y' * 5000}})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(EXAMPLES), str(tmp_path)])
    path = tmp_path / "table.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    kept = Table(tmp_path)
    found = kept.rows()
    assert [row["seed"] for row in found] == list(range(len(found))) and len(found) > 3
    kept.append({**found[0], "seed": -1})
    assert [row["seed"] for row in kept.rows()][-1] == -1


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        table.read(path)


def test_validation_comes_out_of_train_and_never_out_of_test():
    test = rows(20, start=30)
    pool = [*rows(60), *rows(10)]  # 20 rows of test stand in train too, and 10 rows stand there twice
    train, val, same_test = data.split(pool, test, train_rows=25, val_rows=10, seed=0)
    assert same_test == test
    texts = [{row["question"] for row in part} for part in (train, val, test)]
    assert [len(part) for part in texts] == [25, 10, 20]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert data.split(pool, test, train_rows=25, val_rows=10, seed=0) == (train, val, test)
    assert data.split(pool, test, train_rows=25, val_rows=10, seed=1)[0] != train
    all_but_val = data.split(pool, test, train_rows=0, val_rows=10, seed=0)[0]
    assert len(all_but_val) == 30 and all_but_val[:25] == train
    with pytest.raises(ValueError, match="40 different rows, but 41"):
        data.split(pool, test, train_rows=31, val_rows=10, seed=0)


def test_batches_have_few_shapes_and_all_rows_in_another_order_each_epoch():
    given = [{**row, "question": row["question"] + " the" * (i % 40)} for i, row in enumerate(rows(70))]
    task = sp.MultipleChoice(tiny.tokenizer())
    batches = data.FixedWidthBatches(given, task, 8, num_widths=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = list(batches), list(batches)
    assert {tuple(b.inputs["input_ids"].shape) for b in first} <= {(8, width) for width in batches.widths}
    assert len(batches.widths) == 2 and all(width % 16 == 0 for width in batches.widths)
    order = torch.cat([b.index for b in first]).tolist()
    assert len(order) == 64 == len(set(order))
    assert order != torch.cat([b.index for b in second]).tolist()
    for batch in first:
        assert batch.target.tolist() == [given[i]["answer"] for i in batch.index]


def table_row(dataset, method, seed, nll, **more):
    found = {"nll": nll, "ece": nll / 10, "brier": 1 - nll, "accuracy": 0.5, **more}
    settings = {"kind": method}
    fixed = {"split": "test", "settings": settings, "parameters": {"total": 10, "extra": 2}, "peak_bytes": None}
    cost = {"train_seconds": 1.0, "predict_seconds": 2.0}
    return {"dataset": dataset, "method": method, "seed": seed, **fixed, **cost, **found}


def test_mean_standard_error_and_ranks_are_those_by_hand():
    nlls = {("a", 0): (0.2, 0.4, 0.3), ("a", 1): (0.4, 0.4, 0.1), ("b", 0): (0.5, 0.1, 0.9)}
    found = [
        table_row(dataset, method, seed, nll)
        for (dataset, seed), values in nlls.items()
        for method, nll in zip(("x", "y", "z"), values, strict=True)
    ]
    found.append(table_row("b", "x", 1, 0.7))  # y and z lack this block: it has no ranks
    frame = report.frame_of(found)
    means = report.summary(frame, ["nll"])
    assert means.loc[("a", "x"), ("nll", "mean")] == pytest.approx(0.3)
    assert means.loc[("a", "x"), ("nll", "se")] == pytest.approx(0.1)  # sd 0.1414 / sqrt 2
    assert means.loc[("b", "x"), ("runs", "")] == 2
    assert np.isnan(means.loc[("b", "y"), ("nll", "se")])
    ranks = report.ranks(frame)
    # NLL: x 1, 2.5, 2; y 3, 2.5, 1; z 2, 1, 3. ECE has the same order, and the Brier score here the opposite one.
    assert ranks.loc["x", "nll"] == pytest.approx(5.5 / 3)
    assert ranks.loc["y", "nll"] == pytest.approx(6.5 / 3)
    assert ranks.loc["z", "ece"] == pytest.approx(6 / 3)
    assert ranks.loc["x", "brier"] == pytest.approx((3 + 1.5 + 2) / 3)
    by_block = np.array([1 + 1 + 3, 2.5 + 2.5 + 1.5, 2 + 2 + 2]) / 3
    assert ranks.loc["x", "mean"] == pytest.approx(by_block.mean())
    assert ranks.loc["x", "se"] == pytest.approx(by_block.std(ddof=1) / 3**0.5)
    assert set(ranks["blocks"]) == {3}


def test_the_markdown_shows_percent_and_what_has_no_standard_error():
    frame = report.frame_of([table_row("a", "x", s, n, accuracy=n) for s, n in ((0, 0.9), (1, 0.94))])
    text = report.dataset_table(frame)
    assert text.splitlines()[2].startswith("| x | 2 | 92.0 ± 2.0 | 0.920 ± 0.020 |")
    assert report.cell(1234.5, float("nan"), 1) == "1,234.5"


def test_methods_are_read_from_the_command_line():
    found = options.methods_of(
        ["laplace_lora", "mle", "scalabl"], ['scalabl={"kl_weight": 0.5}'], ['cold=scalabl:{"init_scale": 0.3}']
    )
    assert [method.name for method in found] == ["mle", "laplace_lora", "scalabl", "cold"]
    assert found[3].options == {"kl_weight": 0.5, "init_scale": 0.3}
    for given, message in (
        ((["mle"], ["nothing={}"], []), "The method 'nothing' is unknown"),
        ((["mle"], ["mle={"], []), "not JSON"),
        ((["mle"], ["mle=3"], []), "must be a JSON object"),
        ((["mle"], [], ["mle=mle"]), "share a name"),
    ):
        with pytest.raises(ValueError, match=message):
            options.methods_of(*given)
    with pytest.raises(ValueError, match="I must lie between 0"):
        options.shard_of("3/3")


def test_the_defaults_of_the_command_line_are_those_of_the_budget():
    args = options.arguments(None, ["--set", "mle={}", "--set", "map={}"])
    assert repr(options.budget_of(args)) == repr(methods.Budget())
    assert args.set == ["mle={}", "map={}"]


def test_weights_of_the_kl_from_json():
    rise = methods.kl_weight({"to": 0.5, "over": 10}, 100, 4)
    assert [rise(step) for step in (0, 4, 9, 50)] == pytest.approx([0.05, 0.25, 0.5, 0.5])
    assert methods.kl_weight("paper", 100, 4) == sp.baselines.KLReweighting(100, 4)
    assert methods.kl_weight(0.3, 100, 4) == 0.3


@pytest.mark.filterwarnings("default::scalabl_pyro.ScalaBLWarning")
def test_parameters_beside_plain_lora_are_counted():
    task = sp.MultipleChoice(tiny.tokenizer())
    toy = data.DataSet("toy", rows(12), rows(4, 20), rows(4, 30), {}, task)
    llm = tiny.causal_lm()
    bench = methods.Workbench(llm, methods.Budget(num_steps=2, batch_size=4, rank=2, num_draws=2))
    extra = {}
    for name in ("mle", "tfb", "map", "mc_dropout", "ensemble", "blob", "scalabl", "scalabl_released"):
        learned = bench.learn(methods.Method(name, name, {}), toy, 0)
        extra[name] = methods.num_parameters(learned.posterior)["extra"]
        lora = sum(A.numel() + B.numel() for A, B in learned.posterior.adapter.factors())
        latents = learned.posterior.adapter.subspace.dim
        of_A = sum(A.numel() for A, _ in learned.posterior.adapter.factors())
    bench.clear()
    points = {"mle": 0, "map": 0, "mc_dropout": 0, "tfb": 1}
    assert extra == points | {
        "ensemble": 2 * lora,
        "blob": of_A,
        "scalabl": 2 * latents,
        "scalabl_released": 2 * latents,
    }
    assert not any("lora" in name for name, _ in llm.named_modules())


PUBLISHED = {
    "allenai/winogrande": {"sentence": "_ won.", "option1": "A cat", "option2": "A dog", "answer": "2"},
    "allenai/ai2_arc": {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
    "allenai/openbookqa": {
        "question_stem": "Why?",
        "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "google/boolq": {"question": "is it", "passage": "It is.", "answer": False},
    "cais/mmlu": {"question": "Why?", "choices": ["x", "y"], "answer": 1},
    "stanfordnlp/sst2": {"sentence": "fine", "label": 1},
    "nyu-mll/glue": {"sentence1": "It is.", "sentence2": "It is not.", "label": 1},
    "fancyzhx/ag_news": {"text": "Rates rise", "label": 2},
}


def test_data_sets_of_the_hub_come_in_one_form(monkeypatch):
    asked = []

    def load_dataset(path, *, split, name=None):
        asked.append((path, name, split))
        return Dataset.from_list([PUBLISHED[path]])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name, source in SOURCES.items():
        if source.hub is None:
            continue
        (row,) = data.rows_of(name, "test", None)
        assert asked[-1] == (source.hub[0], source.hub[1], source.test)
        assert isinstance(row["question"], str) and row["answer"] in (1, 2) and len(row["choices"]) >= 2
    with pytest.raises(ValueError, match=r"trec_train\.jsonl"):
        data.rows_of("trec", "train", None)
    with pytest.raises(ValueError, match="is unknown"):
        data.load("nothing", tiny.tokenizer())


def test_no_table_no_report(tmp_path):
    assert "does not contain any runs" in report.write(tmp_path)
