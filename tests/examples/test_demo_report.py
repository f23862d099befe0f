"""The tables and pictures of the demo: scores, earlier seeds, and the sentences that it reads."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from _support import demo_report, opinions

CLASSES = ("negative", "positive")
SETTINGS = dict.fromkeys(demo_report.SHARED, 1)


def prediction(positive: list[float], target: list[int] | None) -> sp.Prediction:
    probs = np.array([[1 - p, p] for p in positive])
    return sp.Prediction(np.log([probs]), None if target is None else np.array(target), CLASSES, seconds=1.0)


def runs(shift: float = 0.0) -> dict[str, demo_report.Run]:
    """Two methods. Of five rows, LoRA answers three with a probability above 0.9, one of them wrongly."""
    target = [1, 1, 0, 0, 1]
    lora = prediction([0.95, 0.99 - shift, 0.97, 0.2, 0.6], target)
    ours = prediction([0.8, 0.92, 0.6, 0.3 + shift, 0.6], target)
    other = prediction([0.5, 0.6, 0.4], None)
    return {
        name: demo_report.Run({"movie reviews": found, "neutral sentences": other}, fit_s=2.0)
        for name, found in {"LoRA": lora, "ScalaBL, 4 draws": ours}.items()
    }


def test_confident_mistakes_are_counted():
    tables = demo_report.compare(runs(), [])
    table = tables["movie reviews"]
    assert table.loc["LoRA", ["p > 0.9", "of these wrong"]].tolist() == [3, 1]
    assert table.loc["ScalaBL, 4 draws", ["p > 0.9", "of these wrong"]].tolist() == [1, 0]
    assert table.loc["LoRA", "accuracy"] == 0.8
    neutral = tables["neutral sentences (not like the training rows)"]
    assert neutral.columns.tolist() == ["AUROC of the entropy"]
    assert tables["seconds"].loc["LoRA"].tolist() == [2.0, 2.0]


def test_earlier_seeds_give_a_mean_and_its_standard_error():
    tables = demo_report.compare(runs(), [runs(shift=0.05)])
    first, second = (demo_report.compare(runs(shift), [])["movie reviews"].loc["LoRA", "NLL"] for shift in (0.0, 0.05))
    cell = tables["movie reviews, mean of 2 seeds ± standard error"].loc["LoRA", "NLL"]
    mean, error = map(float, cell.split(" ± "))
    assert mean == pytest.approx((first + second) / 2, abs=2e-3)
    assert error == pytest.approx(abs(first - second) / 2, rel=0.6)


def test_a_stored_run_returns_and_other_settings_or_the_same_seed_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_report, "STORED", tmp_path)
    args = argparse.Namespace(**SETTINGS, seed=7)
    demo_report.store(args, runs())
    assert demo_report.stored_runs(args) == []
    assert demo_report.stored_runs(argparse.Namespace(**SETTINGS | {"steps": 2}, seed=0)) == []
    (found,) = demo_report.stored_runs(argparse.Namespace(**SETTINGS, seed=0))
    for name, run in runs().items():
        for source, kept in run.predictions.items():
            np.testing.assert_allclose(found[name].predictions[source].probs, kept.probs, rtol=1e-3)
        pd.testing.assert_series_equal(
            found[name].scores()["movie reviews"], run.scores()["movie reviews"], atol=1e-3, check_names=False
        )


def test_the_committed_seeds_belong_to_the_demo():
    """Their settings are the defaults of the demo, or ``make demo`` would show no earlier seed."""
    defaults = (Path(demo_report.__file__).parents[1] / "quickstart.py").read_text("utf-8")
    files = sorted(demo_report.STORED.glob("seed-*.json"))
    assert len(files) >= 3
    for path in files:
        settings = json.loads(path.read_text("utf-8"))["settings"]
        for name in ("train_rows", "test_rows", "other_rows", "steps", "batch_size", "draws", "blocks", "max_length"):
            assert f'"--{name.replace("_", "-")}", type=int, default={settings[name]},' in defaults, name


def test_the_picture_is_drawn(tmp_path):
    demo_report.draw(runs(), [runs(0.05)], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 20_000


def test_train_and_test_sentences_differ_and_are_clear():
    if not (Path(sys.prefix) / "assets" / opinions.ARCHIVE).exists():
        pytest.skip("the archive of rated sentences is missing: `make install` downloads it")
    train, test = (opinions.movie_reviews(split, count=10**6, seed=0) for split in ("train", "test"))
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert 0.2 < len(test) / (len(train) + len(test)) < 0.3
    for row in (*train, *test):
        assert abs(row["rating"]) >= opinions.UNCLEAR and row["answer"] == (row["rating"] > 0)
    few = opinions.movie_reviews("train", count=50, seed=3)
    assert sum(row["answer"] for row in few) == 25 and few == opinions.movie_reviews("train", count=50, seed=3)
    assert all("answer" not in row for row in opinions.neutral_sentences(count=20, seed=0))


def test_a_missing_archive_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(SystemExit, match="run `make demo`, which downloads it"):
        opinions.movie_reviews("train", count=3, seed=0)
