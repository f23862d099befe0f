"""A run that was cut in two is the run that was not, bit for bit; a checkpoint of another run is refused."""

import ast
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pyro.distributions as dist
import pytest
import tiny
import torch
from kill_and_resume import killed_and_resumed
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.utils.data import DataLoader

import scalabl_pyro as sp
from scalabl_pyro._process import random_state
from scalabl_pyro.data import collate, encode
from scalabl_pyro.training import loop as training
from scalabl_pyro.training.loop import Trainer

ROWS = tiny.question_rows(12)
TEXTS = tiny.text_rows(12)


def choice(**options):
    return sp.bayesian_lora(tiny.causal_lm(), **options), sp.MultipleChoice(tiny.tokenizer())


def fit(made=None, rows=ROWS, **options):
    blora, task = made or choice()
    return sp.fit(blora, task, rows, **{"num_steps": 8, "batch_size": 4, "lr": 1e-2, "progress": False, **options})


def stop_after(steps):
    return [lambda row: row["step"] + 1 == steps]


def everything(result):
    """All that was learned, and what was recorded on the way but for the time."""
    posterior = result.posterior
    parts = {"guide": posterior.guide, "prior": posterior.prior, "task": posterior.task, **posterior.heads}
    tensors = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    for number, (A, B) in enumerate(posterior.factors):
        tensors |= {f"A{number}": A, f"B{number}": B}
    return tensors, result.history.drop(columns="seconds")


def assert_equal_bits(one, other):
    (tensors, history), (others, rows) = everything(one), everything(other)
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    pd.testing.assert_frame_equal(history, rows, check_exact=True)


def differ(one, other):
    (tensors, _), (others, _) = everything(one), everything(other)
    return any(not torch.equal(tensor, others[name]) for name, tensor in tensors.items())


# n + resume + n = 2n --------------------------------------------------------------------------------------------------


def classes():
    return (
        sp.bayesian_lora(tiny.classifier(), prior="empirical"),
        sp.SequenceClassification(tiny.tokenizer(), classes=["low", "middle", "high"]),
    )


def numbers():
    return sp.bayesian_lora(tiny.classifier(num_labels=1), prior="horseshoe"), sp.Regression(tiny.tokenizer())


CASES = {
    "defaults": (choice, ROWS, {}),
    "new head, learned prior": (classes, TEXTS, {"guide": "layer_covariance", "optimizer": {"factor_scale": 1.0}}),
    "learned noise, other latents": (numbers, TEXTS, {"draws": "shared", "optimizer": {"max_grad_norm": 1.0}}),
    "dropout, micro-batches": (
        lambda: choice(lora_dropout=0.3),
        ROWS,
        {"hardware": {"micro_batch_size": 2}, "optimizer": {"weight_decay": 0.1}},
    ),
    "masks": (lambda: choice(prior="rank_mask"), ROWS, {"kl_weight": lambda step: min(1.0, step / 4)}),
    "AutoGuide": (choice, ROWS, {"guide": AutoMultivariateNormal}),
    "ELBO that reads its loss": (choice, ROWS, {"guide": "lowrank", "elbo": TraceGraph_ELBO()}),
    "flow": (lambda: choice(gauge="free"), ROWS, {"guide": "flow"}),
    "particles": (choice, ROWS, {"guide": "svgd"}),
    "steps left out": (choice, ROWS, {"on_nonfinite": "restore"}),
}


@pytest.mark.parametrize(("make", "rows", "options"), CASES.values(), ids=CASES)
def test_half_a_run_and_its_resumption_are_the_whole_run_bit_for_bit(make, rows, options, tmp_path):
    whole = fit(make(), rows, **options)
    half = fit(make(), rows, **options, checkpoint_dir=tmp_path, callbacks=stop_after(4))
    assert len(half.history) == 4
    resumed = fit(make(), rows, **options, checkpoint_dir=tmp_path, checkpoint={"resume": True})
    assert_equal_bits(whole, resumed)


def test_checkpoints_do_not_change_the_run(tmp_path):
    assert_equal_bits(fit(), fit(checkpoint_dir=tmp_path, checkpoint={"every": 1}))


def test_a_run_may_be_resumed_in_the_same_process_though_the_factors_have_moved(tmp_path):
    made = choice()
    fit(made, checkpoint_dir=tmp_path, callbacks=stop_after(3))
    assert_equal_bits(fit(), fit(made, checkpoint_dir=tmp_path))


def test_a_run_may_be_resumed_from_any_step(tmp_path):
    whole = fit()
    for steps in range(1, 8):
        fit(checkpoint_dir=tmp_path, callbacks=stop_after(steps))
    assert_equal_bits(whole, fit(checkpoint_dir=tmp_path))


@pytest.mark.parametrize("left_out", ["random states", "moments"])
def test_without_the_random_states_or_the_moments_it_would_be_another_run(left_out, tmp_path, monkeypatch):
    whole = fit()
    fit(checkpoint_dir=tmp_path, callbacks=stop_after(4))
    if left_out == "random states":
        monkeypatch.setattr(random_state, "set_generator_states", lambda states: [])
    else:
        monkeypatch.setattr(sp.training.loop.LearnedState, "_load_moments", lambda *args: None)
    assert differ(whole, fit(checkpoint_dir=tmp_path))


def test_a_finished_run_is_read_back_without_a_step(tmp_path, monkeypatch):
    whole = fit(checkpoint_dir=tmp_path)
    monkeypatch.setattr(training.EagerStep, "__call__", None)
    assert_equal_bits(whole, fit(checkpoint_dir=tmp_path))


def test_seconds_and_progress_go_on_from_where_they_were(tmp_path, capsys):
    half = fit(checkpoint_dir=tmp_path, callbacks=stop_after(4))
    resumed = fit(checkpoint_dir=tmp_path, progress=True)
    assert (resumed.history["seconds"].iloc[:4] == half.history["seconds"]).all()
    assert resumed.history["seconds"].is_monotonic_increasing
    assert resumed.history["step"].tolist() == list(range(8))
    assert resumed.posterior.provenance["num_steps"] == 8
    assert "fit: step 8 of 8" in capsys.readouterr().err


def test_resuming_leaves_the_global_random_state_alone(tmp_path, unchanged_rng):
    fit(checkpoint_dir=tmp_path, callbacks=stop_after(4))
    fit(checkpoint_dir=tmp_path)


def test_members_of_an_ensemble_have_folders_of_their_own(fitted, tmp_path):
    options = {"num_members": 2, "num_steps": 2, "progress": False, "checkpoint_dir": tmp_path}
    sp.ensemble(fitted.posterior, ROWS, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed-0", "seed-1"]


# where the data was ---------------------------------------------------------------------------------------------------


def loader(*, shuffle=True, rows=ROWS, **options):
    task = sp.MultipleChoice(tiny.tokenizer())
    examples = list(enumerate(encode(rows, task.encode, need_target=True)))

    def together(pairs):
        return collate([e for _, e in pairs], [i for i, _ in pairs], task.pad_token_id)

    return DataLoader(examples, batch_size=5, shuffle=shuffle, collate_fn=together, **options)


LOADERS = {
    "in order": lambda: loader(shuffle=False),
    "shuffled by the global generator": loader,
    "shuffled by its own": lambda: loader(generator=torch.Generator().manual_seed(3)),
    "a list of batches": lambda: list(loader(shuffle=False)),
    "a generator": lambda: (batch for _ in range(9) for batch in loader(shuffle=False)),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_a_loader_is_gone_through_again_up_to_where_the_run_was(make, steps, tmp_path):
    whole = fit(rows=make(), num_data=12)
    fit(rows=make(), num_data=12, checkpoint_dir=tmp_path, callbacks=stop_after(steps))
    assert_equal_bits(whole, fit(rows=make(), num_data=12, checkpoint_dir=tmp_path))


def test_the_noise_of_training_does_not_depend_on_how_a_loader_shuffles():
    order = [batch.index.tolist() for batch in loader(shuffle=False)]
    plain, noisy = (
        fit(rows=loader(shuffle=False), num_steps=3),
        fit(rows=list(loader(shuffle=False)), num_data=12, num_steps=3),
    )
    assert len(order) == 3
    assert_equal_bits(plain, noisy)


OTHER_DATA = {
    "another order": lambda: loader(generator=torch.Generator().manual_seed(4)),
    "other rows": lambda: loader(shuffle=False, rows=tiny.question_rows(12, seed=5)),
}


@pytest.mark.parametrize("make", OTHER_DATA.values(), ids=OTHER_DATA)
def test_a_loader_that_gives_other_batches_is_refused(make, tmp_path):
    fit(rows=loader(generator=torch.Generator().manual_seed(3)), checkpoint_dir=tmp_path, callbacks=stop_after(4))
    with pytest.raises(ValueError, match="does not repeat the first 4 batches of the run that is resumed"):
        fit(rows=make(), checkpoint_dir=tmp_path)


def test_a_generator_that_was_used_before_is_refused(tmp_path):
    batches = LOADERS["a generator"]()
    fit(rows=batches, num_data=12, checkpoint_dir=tmp_path, callbacks=stop_after(4))
    with pytest.raises(ValueError, match=r"does not repeat the first 4 batches .* iterator that was used before"):
        fit(rows=batches, num_data=12, checkpoint_dir=tmp_path)


# what may be resumed --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folder of a run that was stopped after 4 of 8 steps."""
    path = tmp_path_factory.mktemp("begun")
    fit(checkpoint_dir=path, callbacks=stop_after(4))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


OTHER_RUNS = {
    "num_steps is 9, was 8": {"num_steps": 9},
    "lr is 0.02, was 0.01; num_steps is 9, was 8": {"num_steps": 9, "lr": 0.02},
    "seed is 1, was 0": {"seed": 1},
    "guide: class is 'LowRankGuide', was 'NormalGuide'": {"guide": "lowrank"},
    "schedule is 'constant', was 'linear'": {"optimizer": {"schedule": "constant"}},
    "kl_weight is 0.5, was 1.0": {"kl_weight": 0.5},
    r"kl_weight is \[0.0,.*was 1.0": {"kl_weight": lambda step: step / 8},
    "max_grad_norm is 'inf', was None": {"optimizer": {"max_grad_norm": float("inf")}},
    "draws is 'shared', was 'per_example'": {"draws": "shared"},
    "elbo is .*TraceGraph_ELBO.*was None": {"elbo": TraceGraph_ELBO(num_particles=2)},
    "num_data is 11, was 12; train_data differs": {"rows": ROWS[:11]},
    r": train_data differs\.": {"rows": tiny.question_rows(12, seed=1)},
    "layers differs": {"made": lambda: choice(r=4)},
    "gauge is 'free', was 'unit_rows'": {"made": lambda: choice(gauge="free")},
    ": what is held fixed .*numbers of the prior.* differs": {"made": lambda: choice(prior=dist.Normal(0.0, 2.0))},
    "prior: class is 'HorseshoePrior', was 'FixedPrior'": {"made": lambda: choice(prior="horseshoe")},
    "task: options: max_length is 99, was None": {
        "made": lambda: (choice()[0], sp.MultipleChoice(tiny.tokenizer(), max_length=99))
    },
    "Another base model: .* weights of the embeddings": {
        "made": lambda: (sp.bayesian_lora(tiny.causal_lm(seed=1)), choice()[1])
    },
}


@pytest.mark.parametrize(("message", "change"), OTHER_RUNS.items(), ids=OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_and_stays(message, change, begun):
    before = contents(begun)
    change = {k: v() if k == "made" else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"step-00000004 belongs to another run.*{message}"):
        fit(**change, checkpoint_dir=begun)
    assert contents(begun) == before


def test_what_changes_the_bits_at_most_may_differ(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "copy")
    options = {"hardware": {"micro_batch_size": 2}, "on_nonfinite": "skip", "checkpoint": {"every": 3, "keep": 5}}
    assert len(fit(checkpoint_dir=tmp_path / "copy", **options).history) == 8


def test_resume_true_demands_a_checkpoint_and_false_that_there_is_none(begun, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"resume=True, but {tmp_path} holds no valid checkpoint"):
        fit(checkpoint_dir=tmp_path, checkpoint={"resume": True})
    with pytest.raises(FileExistsError, match=r"resume=False, but .* holds checkpoints \(.*step-00000004\)"):
        fit(checkpoint_dir=begun, checkpoint={"resume": False})
    assert len(fit(checkpoint_dir=tmp_path, checkpoint={"resume": False}, num_steps=1).history) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": {"resume": "yes"}}, "resume='yes': expected True, False or 'auto'"),
        ({"checkpoint": {"resume": True}, "checkpoint_dir": None}, "resume=True needs checkpoint_dir"),
        ({"checkpoint": {"every": 0}}, "every=0 must be a whole number, 1 or more"),
        ({"checkpoint": {"keep": 1.5}}, "keep=1.5 must be a whole number, 1 or more"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore' is unknown"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(**{"checkpoint_dir": tmp_path, **options})
    assert list(tmp_path.iterdir()) == []


# how a run ends -------------------------------------------------------------------------------------------------------


def send(signum, *, at):
    def callback(row):
        if row["step"] + 1 == at:
            os.kill(os.getpid(), signum)

    return [callback]


def steps_in(path):
    return [int(p.name.removeprefix("step-")) for p in sorted(path.glob("step-*"))]


@pytest.mark.parametrize("how", ["raised", "signal"])
def test_ctrl_c_returns_what_was_learned_and_saves_it(how, tmp_path, caplog):
    def interrupt(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    callbacks = [interrupt] if how == "raised" else send(signal.SIGINT, at=3)
    handler = signal.getsignal(signal.SIGINT)
    half = fit(checkpoint_dir=tmp_path, callbacks=callbacks)
    assert signal.getsignal(signal.SIGINT) is handler
    taken = 3 if how == "raised" else 4  # a signal lets the running step end
    assert len(half.history) == taken
    assert f"interrupted after {taken} of 8 steps" in caplog.text
    assert steps_in(tmp_path)[-1] == taken
    assert_equal_bits(fit(), fit(checkpoint_dir=tmp_path))


def test_a_second_ctrl_c_is_not_made_to_wait(tmp_path):
    seen = []

    def twice(row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("the first waits")
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("never")

    half = fit(checkpoint_dir=tmp_path, callbacks=[twice])
    assert seen == ["the first waits"]
    assert len(half.history) == 4


def test_sigterm_saves_after_the_running_step_and_exits_with_143(tmp_path):
    with pytest.raises(SystemExit) as caught:
        fit(checkpoint_dir=tmp_path, callbacks=send(signal.SIGTERM, at=3))
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert steps_in(tmp_path)[-1] == 4
    assert_equal_bits(fit(), fit(checkpoint_dir=tmp_path))


def test_a_handler_of_the_callers_own_is_called_after_the_checkpoint(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(steps_in(tmp_path)[-1]))
    try:
        result = fit(checkpoint_dir=tmp_path, callbacks=send(signal.SIGTERM, at=3))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [4]
    assert_equal_bits(fit(), result)  # it returned, so the training went on


def test_without_checkpoints_sigterm_is_left_alone():
    handlers = []
    fit(num_steps=1, callbacks=[lambda row: handlers.append(signal.getsignal(signal.SIGTERM))])
    assert handlers == [signal.SIG_DFL]


def test_a_sigterm_after_the_last_step_is_not_swallowed(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    try:
        fit(checkpoint_dir=tmp_path, callbacks=send(signal.SIGTERM, at=8))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert steps_in(tmp_path)[-1] == 8


def test_in_another_thread_signals_are_left_alone(tmp_path):
    handlers, results = [], []

    def work():
        results.append(fit(checkpoint_dir=tmp_path, callbacks=[look]))

    def look(row):
        handlers.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert set(handlers) == {(signal.getsignal(signal.SIGINT), signal.SIG_DFL)}
    assert len(results[0].history) == 8


def test_an_error_between_two_steps_costs_no_step(tmp_path):
    def fail(row):
        if row["step"] == 4:
            raise OSError("the dashboard is down")

    with pytest.raises(OSError, match="the dashboard is down"):
        fit(checkpoint_dir=tmp_path, callbacks=[fail])
    assert steps_in(tmp_path)[-1] == 5
    assert_equal_bits(fit(), fit(checkpoint_dir=tmp_path))


def test_an_error_within_a_step_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    take = Trainer._take

    def fail(self, step, batch=None, *, validate=False):
        if step == 5:
            self.is_whole = False
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take(self, step, batch, validate=validate)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(Trainer, "_take", fail)
        fit(checkpoint_dir=tmp_path, checkpoint={"every": 2})
    assert steps_in(tmp_path) == [2, 4]
    assert_equal_bits(fit(), fit(checkpoint_dir=tmp_path))


def test_a_resumption_is_logged(begun, tmp_path, caplog):
    shutil.copytree(begun, tmp_path / "copy")
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"):
        fit(checkpoint_dir=tmp_path / "copy")
    assert "step-00000004, 4 of 8 steps" in caplog.text


# kill -9 --------------------------------------------------------------------------------------------------------------


def test_runs_killed_at_random_moments_end_as_the_run_that_was_not(tmp_path):
    assert killed_and_resumed(3, tmp_path)["same bits"] == 3


@pytest.mark.slow
def test_200_runs_killed_at_random_moments_end_as_the_run_that_was_not(tmp_path):
    """In a program of its own, so that nothing but the runs is in the process that forks."""
    script = Path(__file__).parents[1] / "helpers" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, str(script), "200", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = ast.literal_eval(done.stdout)
    assert seen["same bits"] == 200
    assert seen["killed"] > 120
    assert 100 < seen["with a checkpoint to resume from"] < 200
    assert seen["in the middle of writing"] > 10
