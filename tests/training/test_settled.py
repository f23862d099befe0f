"""One line at the end of a training says whether it had settled, and what to change."""

import logging
import re

import numpy as np
import pandas as pd
import pytest
import tiny

import scalabl_pyro as sp
from scalabl_pyro.analysis.training_checks import check_guide, check_history
from scalabl_pyro.training.settled import settled


def history(steps=300, *, arrives=30.0, kl_arrives=30.0, noise=0.05, **columns):
    """Loss and KL that approach their limits exponentially, under a constant learning rate."""
    step = np.arange(steps)
    loss = 0.5 + np.exp(-step / arrives) + noise * np.random.default_rng(0).standard_normal(steps)
    kl = 40 - 20 * np.exp(-step / kl_arrives)
    return pd.DataFrame({"step": step, "loss": loss, "nll": loss - 0.1, "kl": kl, "lr": 1e-3, **columns})


def test_a_training_that_settled():
    assert settled(history(), num_steps=300) == "After 300 steps: loss and guide have settled."


@pytest.mark.parametrize(
    ("options", "message", "advice"),
    [
        ({"arrives": 300.0, "noise": 0.01}, "the loss still falls", "raise num_steps"),
        ({"kl_arrives": 300.0}, "the KL still changes, and with it the means and scales", "lr_scale"),
        ({"arrives": 300.0, "kl_arrives": 300.0, "noise": 0.01}, "still falls.*; the KL still changes", "num_steps"),
    ],
)
def test_one_that_did_not(options, message, advice):
    line = settled(history(**options), num_steps=300)
    assert line.startswith("After 300 steps: ") and "\n" not in line and "settled" not in line
    assert re.search(message, line) and advice in line


def test_the_findings_are_those_of_diagnose():
    frame = history(arrives=300.0, noise=0.01)
    (slope, _), (guide,) = check_history(frame), check_guide(frame)
    assert slope.severity == "warning" and guide.severity == "ok"
    assert slope.cause.rstrip(".") in settled(frame, num_steps=300) and slope.advice in settled(frame, num_steps=300)


def test_the_share_of_the_kl_is_that_of_a_straight_line():
    """A KL that rises linearly makes a third of its way in the last third of the steps."""
    frame = history(300)
    frame["kl"] = np.linspace(10.0, 40.0, 300)
    (finding,) = check_guide(frame)
    assert finding.severity == "warning" and finding.value == pytest.approx(1 / 3, abs=0.01)


def test_few_steps_and_a_point():
    assert "too few steps to tell" in settled(history(20), num_steps=20)
    assert settled(history(kl=np.nan), num_steps=300) == "After 300 steps: the loss has settled."
    assert settled(history(100), num_steps=300).startswith("Ended after 100 of 300 steps: ")


def test_harm_comes_first():
    frame = history()
    frame["loss"] = 3.0 - frame["loss"]
    line = settled(frame, num_steps=300)
    assert "ended above its start" in line and "Lower the learning rates" in line


def test_held_out_rows_that_get_worse():
    frame = history()
    scores = np.full(300, np.nan)
    scores[99::100] = [0.6, 0.5, 0.7]
    frame["eval_nll"] = scores
    line = settled(frame, num_steps=300)
    assert "the held-out NLL was lowest after 200 steps (0.5, at the end 0.7)" in line and "pass patience=" in line
    assert "patience" not in settled(frame, num_steps=300, patience=3)
    frame["eval_nll"] = np.where(frame["step"] == 299, 0.501, frame["eval_nll"])  # within the noise
    assert "lowest" not in settled(frame, num_steps=300)


def fit(num_steps, **options):
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    options = {"batch_size": 8, "lr": 2e-2, "lr_A": 1e-2, "progress": False, **options}
    return sp.fit(blora, task, tiny.question_rows(24), num_steps=num_steps, **options)


def test_fit_says_it_in_its_result_and_in_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"):
        short = fit(40, lr=1e-3, optimizer={"lr_scale": 5e-3})
    assert short.settled.startswith("After 40 steps: ") and "still" in short.settled and "num_steps" in short.settled
    assert short.settled in caplog.text
    assert f"\n  {short.settled}\n" in repr(short) and "settled" in short._repr_html_()
    assert "too few steps" in fit(3).settled


def test_a_long_fit_has_settled():
    result = fit(400, optimizer={"lr_scale": 0.1})
    assert result.settled == "After 400 steps: loss and guide have settled."
