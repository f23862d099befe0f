"""Held-out rows are scored while a training runs: right values, the same training, the best state, exact resumption."""

import copy
import logging
import math
import os
import signal

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from completions import rows as text_rows
from processes import results, run_together
from torch.utils.data import DataLoader

import scalabl_pyro as sp
from scalabl_pyro import baselines
from scalabl_pyro.data import collate, encode
from scalabl_pyro.training import held_out_scores
from scalabl_pyro.training.held_out import HeldOut

ALL = list({row["question"]: row for row in tiny.question_rows(200)}.values())
TRAIN, HELD_OUT = ALL[:12], ALL[12:]
SCORES = ["nll", "accuracy", "ece"]


def fit(rows=TRAIN, made=None, **options):
    blora, task = made or (sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer()))
    return sp.fit(
        blora, task, rows, **{"num_steps": 12, "batch_size": 4, "lr": 2e-2, "lr_A": 1e-2, "progress": False, **options}
    )


def learned(result):
    posterior = result.posterior
    parts = {"guide": posterior.guide, "prior": posterior.prior, "task": posterior.task, **posterior.heads}
    tensors = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    for number, (A, B) in enumerate(posterior.factors):
        tensors |= {f"A{number}": A, f"B{number}": B}
    return tensors


def assert_equal_bits(one, other):
    first, second = learned(one), learned(other)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def scripted(monkeypatch, values):
    """Give the evaluations these held-out NLLs, in this order."""
    left = list(values)
    real = held_out_scores.HeldOutScores.__call__
    monkeypatch.setattr(
        held_out_scores.HeldOutScores, "__call__", lambda self: real(self) | {"eval_nll": float(left.pop(0))}
    )


# values ---------------------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_posterior_under_the_same_draws():
    result = fit(eval_data=HELD_OUT, eval_every=5)
    assert result.evaluations["step"].tolist() == [4, 9, 11]  # the last step is always evaluated
    expected = result.posterior.predict(HELD_OUT, num_draws=8, seed=0).metrics().loc["value", SCORES]
    found = result.evaluations.iloc[-1][[f"eval_{name}" for name in SCORES]]
    np.testing.assert_allclose(found.to_numpy(float), expected.to_numpy(float), rtol=1e-5)
    assert result.history["eval_nll"].notna().sum() == 3
    assert result.history["kept"].tolist() == [False] * 11 + [True]


def test_an_earlier_evaluation_is_that_of_a_run_that_ends_there():
    whole = fit(eval_data=HELD_OUT, eval_every=4, optimizer={"schedule": "constant", "warmup": 0.0})
    part = fit(eval_data=HELD_OUT, num_steps=4, eval_every=4, optimizer={"schedule": "constant", "warmup": 0.0})
    names = ["eval_nll", "eval_accuracy", "eval_ece"]
    pd.testing.assert_frame_equal(whole.evaluations.loc[:0, names], part.evaluations[names], check_exact=True)


def test_options_say_how_many_draws():
    result = fit(eval_data=HELD_OUT, evaluation={"num_draws": 3, "batch_size": 2})
    expected = result.posterior.predict(HELD_OUT, num_draws=3, seed=0).metrics().loc["value", "nll"]
    assert result.evaluations["eval_nll"].iloc[-1] == pytest.approx(expected, rel=1e-5)
    mean = fit(eval_data=HELD_OUT, evaluation=sp.EvaluationOptions(num_draws=0))
    expected = mean.posterior.predict(HELD_OUT, num_draws=0).metrics().loc["value", "nll"]
    assert mean.evaluations["eval_nll"].iloc[-1] == pytest.approx(expected, rel=1e-5)
    assert len(fit(eval_data=HELD_OUT, num_steps=40).evaluations) == 10  # a tenth of the steps is the default


def test_numbers_have_nll_and_rmse():
    rows = [{"text": row["question"], "label": 100.0 + 7 * row["answer"]} for row in ALL]
    made = sp.bayesian_lora(tiny.classifier(num_labels=1)), sp.Regression(tiny.tokenizer())
    result = fit(rows[:12], made, eval_data=rows[12:])
    expected = result.posterior.predict(rows[12:], num_draws=8, seed=0).metrics().loc["value", ["nll", "rmse"]]
    found = result.evaluations.iloc[-1][["eval_nll", "eval_rmse"]]
    np.testing.assert_allclose(found.to_numpy(float), expected.to_numpy(float), rtol=1e-4)


def test_texts_have_nll_per_row_and_per_token():
    made = sp.bayesian_lora(tiny.causal_lm()), sp.Completion(tiny.tokenizer(), end_token=False)
    held = [{"prompt": "the night is", "completion": " black ."}, {"prompt": "a rose", "completion": " is red . ."}]
    result = fit(text_rows(), made, eval_data=held)
    scored = result.posterior.score(held, num_draws=8, seed=0)
    total = -float(np.sum(scored.log_prob))
    tokens = sum(len(row.tokens) for row in scored.rows)
    last = result.evaluations.iloc[-1]
    assert last["eval_nll"] == pytest.approx(total / 2, rel=1e-4)
    assert last["eval_nll_per_token"] == pytest.approx(total / tokens, rel=1e-4)


def test_an_output_that_is_not_a_number_counts_as_infinite(monkeypatch, caplog):
    real = held_out_scores.HeldOutScores._scores

    def broken(self, examples):
        if len(calls) == 1:
            calls.append("broken")
            raise FloatingPointError("The LLM's outputs of rows [3] are NaN.")
        calls.append("whole")
        return real(self, examples)

    calls = []
    monkeypatch.setattr(held_out_scores.HeldOutScores, "_scores", broken)
    result = fit(eval_data=HELD_OUT, eval_every=4, patience=5)
    assert math.isinf(result.evaluations["eval_nll"].iloc[1]) and math.isnan(result.evaluations["eval_ece"].iloc[1])
    assert not result.evaluations["kept"].iloc[1]
    assert "held-out rows have no finite NLL: The LLM's outputs of rows [3]" in caplog.text


# the training stays the same ------------------------------------------------------------------------------------------

WAYS = {
    "normal": {},
    "low rank": {"guide": "lowrank"},
    "flow": {"guide": "flow"},
    "particles": {"guide": "svgd"},
    "point": {"guide": "delta"},
    "micro-batches": {"hardware": {"micro_batch_size": 2}},
    "patience that is never used up": {"patience": 99, "keep_last": True},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_evaluations_do_not_change_the_training(way, unchanged_rng):
    options = {k: v for k, v in way.items() if k not in ("patience", "keep_last")}
    plain = fit(**options)
    watched = fit(**options, eval_data=HELD_OUT, eval_every=1)
    assert_equal_bits(plain, watched)
    columns = plain.history.columns.drop("seconds")
    pd.testing.assert_frame_equal(plain.history[columns], watched.history[columns], check_exact=True)


def test_dropout_of_the_adapter_is_on_in_steps_and_off_in_evaluations():
    def run(**options):
        made = sp.bayesian_lora(tiny.causal_lm(), lora_dropout=0.3), sp.MultipleChoice(tiny.tokenizer())
        made[0].llm.train()
        result = fit(made=made, **options)
        assert all(module.training for module in made[0].llm.modules())
        return result

    watched = run(eval_data=HELD_OUT, eval_every=3)
    assert_equal_bits(run(), watched)
    expected = watched.posterior.predict(HELD_OUT, num_draws=8, seed=0).metrics().loc["value", "nll"]
    assert watched.evaluations["eval_nll"].iloc[-1] == pytest.approx(expected, rel=1e-5)


def test_callbacks_see_the_scores_in_the_row_of_their_step():
    rows = []
    result = fit(eval_data=HELD_OUT, eval_every=4, callbacks=[lambda row: rows.append(dict(row))])
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["eval_nll"] for row in rows if row["eval_nll"] == row["eval_nll"]] == (
        result.evaluations["eval_nll"].tolist()
    )


# the best state -------------------------------------------------------------------------------------------------------


def test_the_posterior_is_that_of_the_lowest_nll_and_training_stops(monkeypatch, caplog):
    scripted(monkeypatch, [1.0, 0.5, 0.6, 0.5, 9.0])  # equal is not lower
    with caplog.at_level(logging.INFO):
        result = fit(eval_data=HELD_OUT, eval_every=2, patience=2)
    assert len(result.history) == 8
    assert result.history.loc[result.history["kept"], "step"].tolist() == [3]
    record = result.posterior.provenance["evaluation"]
    assert (record["kept_step"], record["nll"], record["stopped_early"]) == (3, 0.5, True)
    assert record["why"] == "the lowest held-out NLL of all evaluations"
    assert (record["num_rows"], record["num_draws"]) == (len(HELD_OUT), 8)
    assert "stopped after 8 of 12 steps: the held-out NLL was not lower in 2 evaluations" in caplog.text
    assert "kept_step=3" in repr(result) and "eval_nll=0.5" in repr(result)


def test_what_is_kept_is_all_that_the_training_changes(monkeypatch):
    def made():
        return (
            sp.bayesian_lora(tiny.classifier(), prior="empirical"),
            sp.SequenceClassification(tiny.tokenizer(), classes=["low", "middle", "high"]),
        )

    rows = [{"text": row["question"], "label": row["answer"] % 3} for row in ALL]
    options = {"optimizer": {"schedule": "constant", "warmup": 0.0, "factor_scale": 1.0}, "guide": "layer_covariance"}
    scripted(monkeypatch, [2.0, 1.0, 3.0, 3.0])
    kept = fit(rows[:12], made(), eval_data=rows[12:], eval_every=3, patience=9, **options)
    monkeypatch.undo()
    assert_equal_bits(kept, fit(rows[:12], made(), num_steps=6, **options))  # with a constant rate it is that run
    assert len(kept.history) == 12 and not kept.posterior.provenance["evaluation"]["stopped_early"]


def test_the_llm_rests_at_the_kept_state(monkeypatch):
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    result = fit(eval_data=HELD_OUT, eval_every=4, patience=3)
    blora = result.posterior.adapter
    for (A, B), (live_A, live_B) in zip(result.posterior.factors, blora.factors(), strict=True):
        assert torch.equal(A, live_A) and torch.equal(B, live_B)
    assert torch.equal(blora.loc.cpu(), result.posterior.mean())


def test_without_a_finite_nll_the_last_state_is_kept(monkeypatch):
    scripted(monkeypatch, [math.inf] * 5)
    result = fit(eval_data=HELD_OUT, eval_every=2, patience=3)
    assert len(result.history) == 6 and result.history["kept"].iloc[-1]
    assert "no held-out NLL was finite" in result.posterior.provenance["evaluation"]["why"]


def test_a_run_that_a_callback_ends_holds_the_best_state_so_far(monkeypatch):
    scripted(monkeypatch, [1.0, 2.0, 2.0])
    stop = [lambda row: row["step"] == 8]
    result = fit(eval_data=HELD_OUT, eval_every=4, patience=9, callbacks=stop)
    assert result.history.loc[result.history["kept"], "step"].tolist() == [3]
    early = fit(eval_data=HELD_OUT, eval_every=4, patience=9, callbacks=[lambda row: True])
    assert "before the first evaluation" in early.posterior.provenance["evaluation"]["why"]
    plain = fit(eval_data=HELD_OUT, eval_every=50)
    assert plain.posterior.provenance["evaluation"]["why"].startswith("the last step of the training; fit(patience=")


def test_an_error_holds_the_best_state_so_far(monkeypatch):
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    task = sp.MultipleChoice(tiny.tokenizer())
    likelihood, calls = task.likelihood, []

    def broken(outputs, batch):
        calls.append(outputs.requires_grad)
        return likelihood(outputs * (math.nan if sum(calls) > 10 and outputs.requires_grad else 1), batch)

    task.likelihood = broken
    with pytest.raises(sp.TrainingError) as caught:
        fit(made=(sp.bayesian_lora(tiny.causal_lm()), task), eval_data=HELD_OUT, eval_every=4, patience=9)
    history = caught.value.result.history
    assert len(history) == 10 and history.loc[history["kept"], "step"].tolist() == [3]


def test_skipped_steps_leave_the_scores_at_the_last_step_that_counted():
    task = sp.MultipleChoice(tiny.tokenizer())
    likelihood, calls = task.likelihood, []

    def broken(outputs, batch):
        calls.append(outputs.requires_grad)
        return likelihood(outputs * (math.nan if sum(calls) == 4 and outputs.requires_grad else 1), batch)

    task.likelihood = broken
    made = sp.bayesian_lora(tiny.causal_lm()), task
    result = fit(made=made, eval_data=HELD_OUT, eval_every=4, on_nonfinite="skip")
    assert 3 not in result.history["step"].tolist()
    assert result.evaluations["step"].tolist() == [2, 7, 11]


# checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", range(1, 10))
def test_a_run_with_patience_resumes_from_any_step(stop_at, tmp_path, monkeypatch):
    values = [3.0, 2.0, 2.5, 2.5, 1.0]
    options = {"eval_data": HELD_OUT, "eval_every": 2, "patience": 2}
    scripted(monkeypatch, values)
    whole = fit(**options)
    assert len(whole.history) == 8
    monkeypatch.undo()
    scripted(monkeypatch, values)
    stop = [lambda row: row["step"] + 1 == stop_at]
    fit(**options, checkpoint_dir=tmp_path, checkpoint={"every": 3}, callbacks=stop)
    resumed = fit(**options, checkpoint_dir=tmp_path, checkpoint={"every": 3, "resume": True})
    assert_equal_bits(whole, resumed)
    pd.testing.assert_frame_equal(
        whole.history.drop(columns="seconds"), resumed.history.drop(columns="seconds"), check_exact=True
    )
    without = {"options", "seconds"}
    first, second = ({k: v for k, v in r.posterior.provenance.items() if k not in without} for r in (whole, resumed))
    assert first == second


def test_a_signal_between_step_and_evaluation_loses_nothing(tmp_path):
    options = {"eval_data": HELD_OUT, "eval_every": 2, "patience": 2}
    whole = fit(**options)

    def interrupt(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)  # step 3 ends, and is not evaluated

    half = fit(**options, checkpoint_dir=tmp_path, callbacks=[interrupt])
    assert len(half.history) == 4 and half.evaluations["step"].tolist() == [1]
    seen = []
    resumed = fit(**options, checkpoint_dir=tmp_path, callbacks=[lambda row: seen.append(dict(row))])
    assert_equal_bits(whole, resumed)
    assert seen[0]["step"] == 3 and seen[0]["eval_nll"] == whole.evaluations["eval_nll"].iloc[1]
    pd.testing.assert_frame_equal(whole.evaluations, resumed.evaluations, check_exact=True)


def test_other_evaluations_make_another_run(tmp_path):
    options = {"eval_data": HELD_OUT, "eval_every": 2, "patience": 3}
    fit(**options, checkpoint_dir=tmp_path, callbacks=[lambda row: row["step"] == 3])
    changes = {
        "patience is 4, was 3": {"patience": 4},
        "eval_every is 3, was 2": {"eval_every": 3},
        "eval_data differs": {"eval_data": HELD_OUT[1:]},
        "eval_num_draws is 4, was 8": {"evaluation": {"num_draws": 4}},
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
            fit(**{**options, **change}, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: eval_data differs; eval_every is None, was 2"):
        fit(checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_worse": -1},
        {"num_worse": True},
        {"evaluated": 99},
        {"best_nll": math.inf},
        {"best_step": None},
        {"best_step": 12},
        {"more": 1},
    ],
    ids=str,
)
def test_a_record_that_no_run_writes_is_refused(change):
    def new():
        return HeldOut(dict, ("eval_nll",), every=2, num_steps=12, patience=2)

    class Learned:
        def check(self, tensors):
            assert set(tensors) == {"module.x"}

    record = {"best_step": 3, "best_nll": 0.5, "num_worse": 1, "evaluated": 6}
    best = {"module.x": torch.ones(1)}
    held_out = new()
    held_out.load_state(best, record, Learned())
    assert held_out.record() == record and not held_out.is_due(6) and held_out.is_due(8)
    for wrong in (None, {**record, **change}):
        with pytest.raises(ValueError, match="evaluations on held-out rows"):
            new().load_state(best, wrong, Learned())
    with pytest.raises(ValueError, match="evaluations on held-out rows"):
        new().load_state({}, record, Learned())


# several processes ----------------------------------------------------------------------------------------------------


def in_two(rank, folder):
    def run(**options):
        made = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64)), sp.MultipleChoice(tiny.tokenizer())
        return fit(made=made, eval_data=HELD_OUT, eval_every=1, patience=1, lr=5e-2, **options)

    result = run()
    run(checkpoint_dir=folder, callbacks=[lambda row: row["step"] == 1])
    resumed = run(checkpoint_dir=folder)
    return [(learned(r), r.history.drop(columns="seconds")) for r in (result, resumed)]


def test_two_processes_take_the_decisions_of_one(tmp_path):
    made = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64)), sp.MultipleChoice(tiny.tokenizer())
    one = fit(made=made, eval_data=HELD_OUT, eval_every=1, patience=1, lr=5e-2)
    assert len(one.history) < 12
    found = results(run_together(in_two, tmp_path, tmp_path / "run"))
    for tensors, history in (pair for process in found for pair in process):
        assert len(history) == len(one.history)
        assert history["kept"].tolist() == one.history["kept"].tolist()
        np.testing.assert_allclose(history["eval_nll"], one.history["eval_nll"], rtol=1e-6)
        for name, tensor in learned(one).items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-6, atol=1e-6)
    for name, tensor in found[0][0][0].items():
        assert torch.equal(tensor, found[1][0][0][name])


def with_other_rows(rank):
    fit(eval_data=HELD_OUT[rank:], num_steps=2)


def test_all_processes_must_hold_the_same_rows(tmp_path):
    for outcome in run_together(with_other_rows, tmp_path):
        assert "eval_data differs" in outcome.error


# baselines ------------------------------------------------------------------------------------------------------------

METHODS = {
    "mle": {},
    "map_lora": {"scale": 0.5},
    "mc_dropout": {"p": 0.3},
    "blob": {},
    "deep_ensemble": {"num_members": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_baselines_score_held_out_rows_and_stay_the_same(name, unchanged_rng):
    def run(**options):
        method, task = getattr(baselines, name), sp.MultipleChoice(tiny.tokenizer())
        own = {"num_steps": 6, "batch_size": 4, "progress": False, **METHODS[name]}
        return method(tiny.causal_lm(), task, TRAIN, **own, **options)

    plain, watched = run(), run(eval_data=HELD_OUT, eval_every=3)
    columns = plain.history.columns.drop("seconds")
    pd.testing.assert_frame_equal(plain.history[columns], watched.history[columns], check_exact=True)
    one, other = (r.posterior.predict(HELD_OUT, num_draws=4, seed=0) for r in (plain, watched))
    np.testing.assert_array_equal(one.log_probs, other.log_probs)
    last = watched.evaluations.iloc[-1]
    if name in ("mle", "map_lora"):
        assert last["eval_nll"] == pytest.approx(float(other.metrics().loc["value", "nll"]), rel=1e-5)
    else:
        assert math.isfinite(last["eval_nll"])
    assert len(watched.evaluations) == (4 if name == "deep_ensemble" else 2)


@pytest.mark.parametrize("name", ["mc_dropout", "blob"])
def test_noise_of_a_baseline_is_part_of_its_held_out_nll(name):
    """The average over 400 draws per row is that of 400 draws of the posterior, within their Monte Carlo error."""
    own = {"num_steps": 8, "batch_size": 4, "progress": False, "lr": 2e-2, **METHODS[name]}
    task = sp.MultipleChoice(tiny.tokenizer())
    rows = HELD_OUT[:4]
    result = getattr(baselines, name)(
        tiny.causal_lm(), task, TRAIN, **own, eval_data=rows, eval_every=8, evaluation={"num_draws": 400}
    )
    drawn = result.posterior.predict(rows, num_draws=400, seed=1)
    chosen = np.exp(drawn.log_likelihood)
    error = (chosen.std(0) / chosen.mean(0) / 20).mean() * math.sqrt(2)
    expected = float(drawn.metrics().loc["value", "nll"])
    found = result.evaluations["eval_nll"].iloc[-1]
    assert abs(found - expected) < 5 * error + 1e-6
    center = float(result.posterior.predict(rows, num_draws=0).metrics().loc["value", "nll"])
    assert abs(found - center) > 1e-6  # it is not the score of the center


def test_a_method_with_a_loop_of_its_own_refuses_by_name():
    with pytest.raises(TypeError, match=r"scalabl_released.* has no argument 'eval_data'.*takes training rows only"):
        baselines.scalabl_released(tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), TRAIN, eval_data=HELD_OUT)


def test_refit_takes_held_out_rows():
    posterior = fit().posterior
    result = sp.refit(posterior, TRAIN, num_steps=4, batch_size=4, progress=False, eval_data=HELD_OUT, eval_every=2)
    assert result.evaluations["step"].tolist() == [1, 3]


# bad input ------------------------------------------------------------------------------------------------------------


def texts(labels, *, start=0):
    return [{"text": row["question"], "label": label} for row, label in zip(ALL[start:], labels, strict=False)]


def classes():
    names = ["low", "middle", "high"]
    return sp.bayesian_lora(tiny.classifier()), sp.SequenceClassification(tiny.tokenizer(), classes=names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eval_data": []}, ValueError, "eval_data: .*no rows"),
        ({"eval_data": HELD_OUT, "eval_every": 0}, ValueError, "eval_every=0 must be a whole number, 1 or more"),
        ({"eval_data": HELD_OUT, "eval_every": 2.5}, ValueError, "eval_every=2.5 must be a whole number"),
        ({"eval_data": HELD_OUT, "patience": 0}, ValueError, "patience=0 must be a whole number, 1 or more"),
        ({"eval_data": HELD_OUT, "patience": True}, ValueError, "patience=True must be a whole number"),
        ({"patience": 3}, ValueError, "patience=3 needs eval_data="),
        ({"eval_every": 5}, ValueError, "eval_every=5 needs eval_data="),
        ({"evaluation": {"num_draws": 4}}, ValueError, "evaluation=.* needs eval_data="),
        ({"eval_data": HELD_OUT, "evaluation": {"num_draw": 4}}, TypeError, "EvaluationOptions has no option"),
        ({"eval_data": HELD_OUT, "evaluation": {"num_draws": -1}}, ValueError, "num_draws=-1 must be"),
        ({"eval_data": HELD_OUT, "evaluation": {"batch_size": 0}}, ValueError, "batch_size=0 must be"),
        ({"eval_data": "the sky is blue"}, (ValueError, TypeError), "eval_data: "),
        ({"eval_data": 3}, TypeError, "eval_data: "),
        ({"eval_data": [{"question": "what ?", "choices": ["a", "b"]}]}, ValueError, "eval_data: Row 0 has no answer"),
        ({"eval_data": [*HELD_OUT[:2], {"question": "what ?"}]}, ValueError, "eval_data: Row 2"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_starts(options, error, message):
    made = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    with pytest.raises(error, match=message):
        fit(made=made, **options)
    assert not made[0].adapter.has_moved()


def test_batches_are_refused():
    task = sp.MultipleChoice(tiny.tokenizer())
    examples = list(enumerate(encode(HELD_OUT, task.encode, need_target=True)))

    def together(pairs):
        return collate([e for _, e in pairs], [i for i, _ in pairs], task.pad_token_id)

    for loader in (DataLoader(examples, batch_size=2, collate_fn=together), [together(examples)]):
        with pytest.raises(TypeError, match=r"eval_data is .* that yields batches, expected rows"):
            fit(eval_data=loader)


def test_rows_that_are_in_both_are_named():
    shared = copy.deepcopy([TRAIN[7], HELD_OUT[0], TRAIN[2]])
    shared[0]["answer"] = 1  # another answer to the same question
    message = "2 of 3 rows of eval_data have the text of a row of train_data: rows 0, 2 of eval_data are rows 7, 2 of"
    with pytest.warns(sp.ScalaBLWarning, match=message) as seen:
        fit(eval_data=shared, num_steps=1)
    assert seen[0].filename == __file__
    with pytest.warns(sp.ScalaBLWarning, match="rows 0, 1, 2, 3, 4 and 7 more of eval_data"):
        fit(eval_data=TRAIN, num_steps=1)


def test_a_class_that_only_held_out_rows_have_is_named():
    train = texts([0, 1] * 6)
    with pytest.warns(sp.ScalaBLWarning, match=r"no row of train_data has: 'high' \(2 rows\)\. They cannot be learned"):
        fit(train, classes(), eval_data=texts([0, 2, 2], start=12), num_steps=1)
    fit(train, classes(), eval_data=texts([0, 1], start=12), num_steps=1)  # a class less is no reason to warn


def test_a_class_that_the_task_does_not_know_is_an_error():
    with pytest.raises(ValueError, match=r"eval_data: Row 1.*'huge'"):
        fit(texts([0, 1] * 6), classes(), eval_data=texts(["low", "huge"], start=12), num_steps=1)


def test_without_held_out_rows_there_are_no_evaluations():
    with pytest.raises(ValueError, match=r"Nothing was evaluated: pass held-out rows, fit\(..., eval_data=rows\)"):
        _ = fit(num_steps=1).evaluations
