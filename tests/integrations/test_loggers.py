"""Callbacks of the transformers Trainer see a training as a Trainer would show it."""

import math

import pytest
import tiny
from transformers import TrainerCallback

import scalabl_pyro as sp
from scalabl_pyro.integrations.loggers import TrainerLog, log_to

ALL = list({row["question"]: row for row in tiny.question_rows(200)}.values())
STEPS = 6


class Recorder(TrainerCallback):
    """Keeps the events in their order."""

    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append(("begin", args.output_dir))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(("log", state.global_step, logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(("evaluate", state.global_step, metrics))

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.stop_at
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))


def fit(log, **options):
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    own = {"num_steps": STEPS, "batch_size": 4, "progress": False, "eval_data": ALL[12:], "eval_every": 3}
    return sp.fit(blora, task, ALL[:12], callbacks=[log], **{**own, **options})


def test_a_callback_gets_every_number_of_every_row(tmp_path):
    recorder = Recorder()
    with log_to(recorder, output_dir=tmp_path) as log:
        result = fit(log)
    assert recorder.events[0] == ("begin", str(tmp_path)) and recorder.events[-1] == ("end", STEPS)
    logs = {step: values for name, step, values in recorder.events[1:-1] if name == "log"}
    assert list(logs) == [1, 2, 3, 4, 5, 6]
    for row in result.history.drop(columns="kept").to_dict("records"):
        expected = {name: value for name, value in row.items() if name != "step" and not math.isnan(value)}
        assert logs[row["step"] + 1] == expected
    scores = {step: values for name, step, values in recorder.events[1:-1] if name == "evaluate"}
    assert list(scores) == [3, 6] and set(scores[3]) == {"eval_nll", "eval_accuracy", "eval_ece"}


def test_a_second_training_begins_anew(tmp_path, caplog):
    recorder = Recorder(stop_at=2)
    log = log_to(recorder, output_dir=tmp_path)
    fit(log)
    assert not caplog.records and log.control.should_training_stop
    recorder.stop_at = 4
    assert len(fit(log).history) == 4
    log.close()
    steps = [
        event[1] if event[0] in ("log", "end") else event[0] for event in recorder.events if event[0] != "evaluate"
    ]
    assert steps == ["begin", 1, 2, 2, "begin", 1, 2, 3, 4, 4]
    assert "step 0 after step 1, so another training begins" in caplog.text
    recorder.stop_at = None
    assert len(fit(log).history) == STEPS  # after close(), too


def test_every_leaves_rows_out_but_no_scores(tmp_path):
    recorder = Recorder()
    with log_to(recorder, output_dir=tmp_path, every=4) as log:
        fit(log)
    assert [event[1] for event in recorder.events if event[0] == "log"] == [3, 4, 6]


def test_a_callback_may_stop_the_training(tmp_path):
    with TrainerLog(Recorder(stop_at=4), output_dir=tmp_path) as log:
        assert len(fit(log).history) == 4


def test_what_cannot_be_a_logger_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tool='tensorbord' is unknown to transformers. Did you mean 'tensorboard'"):
        log_to("tensorbord")
    with pytest.raises(TypeError, match=r"tool is .* expected a name such as 'tensorboard', or a TrainerCallback"):
        log_to(print)
    with pytest.raises(ValueError, match="every=0 must be a whole number"):
        log_to(Recorder, output_dir=tmp_path, every=0)


def test_a_tool_that_is_missing_is_named(monkeypatch):
    from transformers.integrations import integration_utils

    def missing():
        raise RuntimeError("requires it")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", missing)
    with pytest.raises(ImportError, match=r"tool='tensorboard' is not installed .*pip install tensorboard"):
        log_to("tensorboard")


def test_tensorboard_has_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    with log_to("tensorboard", output_dir=tmp_path) as log:
        result = fit(log)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert {"train/loss", "train/nll", "eval/nll", "eval/ece"} <= set(found.Tags()["scalars"])
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(result.history["loss"].tolist())
    assert [(e.step, e.value) for e in found.Scalars("eval/nll")] == [
        (row.step + 1, pytest.approx(row.eval_nll)) for row in result.evaluations.itertuples()
    ]


def test_mlflow_has_the_numbers(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with log_to("mlflow", output_dir=tmp_path) as log:
        result = fit(log)
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.data.metrics["eval_nll"] == pytest.approx(result.evaluations["eval_nll"].iloc[-1])


def test_wandb_has_the_numbers(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        with log_to("wandb", output_dir=tmp_path) as log:
            result = fit(log)
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert summary["eval/nll"] == pytest.approx(result.evaluations["eval_nll"].iloc[-1])
    assert summary["train/loss"] == pytest.approx(result.history["loss"].iloc[-1])
    assert summary["train/global_step"] == STEPS
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
