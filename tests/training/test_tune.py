"""A search over arguments of fit: each trial is a fit of its own, the best is found, and nothing stays changed."""

import logging
import math
import os
import signal

import numpy as np
import pyro
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.priors import HierarchicalPrior
from scalabl_pyro.training.search_space import Range, arguments_of, search_space

ALL = list({row["question"]: row for row in tiny.question_rows(200)}.values())
TRAIN, HELD_OUT = ALL[:16], ALL[16:]
SHORT = {"num_steps": 4, "batch_size": 4, "progress": False}


def setup(**options):
    return sp.bayesian_lora(tiny.causal_lm(), **options), sp.MultipleChoice(tiny.tokenizer())


def state(blora, task):
    tensors = [*blora.point_estimates.parameters(), *blora.prior.parameters(), *task.parameters(), blora.adapter.loc]
    return torch.cat([t.detach().flatten() for t in tensors])


def test_a_trial_is_a_fit_of_its_own_and_the_same_in_a_longer_search(unchanged_rng):
    blora, task = setup()
    space = {"lr": (1e-3, 1e-1), "optimizer.lr_scale": [1e-2, 1e-1]}
    found = sp.tune(blora, task, TRAIN, HELD_OUT, search=space, num_trials=4, seed=5, **SHORT)
    longer = sp.tune(*setup(), TRAIN, HELD_OUT, search=space, num_trials=6, seed=5, **SHORT)
    values = ["lr", "optimizer.lr_scale", "eval_nll", "eval_accuracy", "eval_ece", "step"]
    assert found.trials[values].equals(longer.trials[values].head(4))
    for trial in found.trials.to_dict("records"):
        chosen = {"lr": trial["lr"], "optimizer": {"lr_scale": trial["optimizer.lr_scale"]}}
        alone = sp.fit(blora, task, TRAIN, eval_data=HELD_OUT, reset=True, seed=5, **SHORT, **chosen)
        assert alone.evaluations["eval_nll"].iloc[-1] == trial["eval_nll"]
    best = found.trials.sort_values("eval_nll").iloc[0]
    assert found.best == {"lr": best["lr"], "optimizer": {"lr_scale": best["optimizer.lr_scale"]}}


def test_the_first_trial_has_the_values_of_fit_where_the_space_holds_them():
    space = {"lr": (1e-3, 1e-1), "num_steps": [2, 3], "guide": ["delta", "normal"], "lr_A": (1e-2, 1e-1)}
    found = sp.tune(*setup(), TRAIN, HELD_OUT, search=space, num_trials=1, batch_size=4, progress=False)
    (first,) = found.trials.to_dict("records")
    assert first["lr"] == 8e-3 and first["guide"] == "normal" and first["num_steps"] in (2, 3)
    assert 1e-2 <= first["lr_A"] <= 1e-1


def test_a_setting_that_matters_is_found():
    """One of three rates is so small that nothing is learned, and one so large that the fit is worse than chance."""
    blora = sp.bayesian_lora(tiny.causal_lm())
    rates = [1e-7, 3e-2, 30.0]
    options = {"num_steps": 60, "batch_size": 8, "progress": False, "lr_A": 1e-2}
    task = sp.MultipleChoice(tiny.tokenizer())
    found = sp.tune(blora, task, TRAIN, HELD_OUT, search={"lr": rates}, num_trials=9, **options)
    assert sorted(found.trials["lr"]) == rates  # none twice
    assert found.best == {"lr": 3e-2}


@pytest.mark.parametrize("is_trained", [False, True])
def test_everything_is_as_before_afterwards(is_trained, unchanged_rng):
    blora, task = setup(prior=HierarchicalPrior())
    with pyro.settings.context(module_local_params=True):
        if is_trained:
            sp.fit(blora, task, TRAIN, **SHORT)
        before = state(blora, task)
        one = sp.tune(blora, task, TRAIN, HELD_OUT, search={"lr": [1e-3, 1e-2]}, num_trials=2, **SHORT)
        assert torch.equal(state(blora, task), before)
        fresh, other = setup(prior=HierarchicalPrior())
        two = sp.tune(fresh, other, TRAIN, HELD_OUT, search={"lr": [1e-3, 1e-2]}, num_trials=2, **SHORT)
    assert one.trials["eval_nll"].equals(two.trials["eval_nll"])  # each trial starts afresh
    assert torch.equal(state(fresh, other), state(*setup(prior=HierarchicalPrior())))


def test_a_trial_that_is_not_finite_fails_with_its_reason_and_the_search_goes_on(caplog):
    blora, task = setup()
    before = state(blora, task)
    options = SHORT | {"num_steps": 8}
    found = sp.tune(blora, task, TRAIN, HELD_OUT, search={"lr": [1e-3, 1e38]}, num_trials=6, **options)
    failed = found.trials[found.trials["state"] == "failed"]
    assert failed["lr"].tolist() == [1e38] and found.best == {"lr": 1e-3}
    assert failed["eval_nll"].isna().all() and failed["reason"].str.contains("step").all()
    with pytest.raises(sp.TrainingError, match=r"No trial of 1 has a finite NLL. .*1e\+38"):
        sp.tune(blora, task, TRAIN, HELD_OUT, search={"lr": [1e38]}, num_trials=2, **options)
    assert torch.equal(state(blora, task), before)


def test_a_trial_that_a_callback_ends_before_it_is_scored_has_failed():
    options = SHORT | {"num_steps": 40, "callbacks": [lambda row: row["step"] == 1]}
    with pytest.raises(sp.TrainingError, match="a callback ended the training before the first evaluation"):
        sp.tune(*setup(), TRAIN, HELD_OUT, search={"lr": [1e-3]}, num_trials=1, **options)


def test_a_best_value_at_the_end_of_what_was_tried_is_told(caplog):
    space = {"num_steps": [1, 2, 30]}
    with caplog.at_level(logging.WARNING):
        found = sp.tune(*setup(), TRAIN, HELD_OUT, search=space, num_trials=12, batch_size=4, progress=False)
    end = {1: "smallest", 30: "largest"}.get(found.best["num_steps"])
    assert bool(found.notes) == (end is not None)
    assert end is None or (f"is the {end} one that was tried" in found.notes[0] and found.notes[0] in caplog.text)


def test_patience_scores_the_state_that_is_kept():
    options = SHORT | {"num_steps": 12, "eval_every": 2, "patience": 2}
    blora, task = setup()
    found = sp.tune(blora, task, TRAIN, HELD_OUT, search={"lr": [3e-2, 1e-1]}, num_trials=2, **options)
    for trial in found.trials.to_dict("records"):
        alone = sp.fit(blora, task, TRAIN, eval_data=HELD_OUT, lr=trial["lr"], reset=True, **options)
        kept = alone.evaluations[alone.evaluations["kept"]].iloc[0]
        assert (kept["eval_nll"], kept["step"]) == (trial["eval_nll"], trial["step"])


def test_ctrl_c_ends_the_search_with_the_trials_so_far(caplog):
    """The signal comes in the second trial."""
    blora, task = setup()
    before, calls = state(blora, task), []

    def press(row):
        calls.append(row["step"])
        if len(calls) == SHORT["num_steps"] + 2:
            os.kill(os.getpid(), signal.SIGINT)

    found = sp.tune(blora, task, TRAIN, HELD_OUT, search={"lr": (1e-3, 1e-2)}, num_trials=3, callbacks=[press], **SHORT)
    assert len(found.trials) == 1 and "interrupted after 1 complete trials" in caplog.text
    assert torch.equal(state(blora, task), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_callbacks_are_those_of_the_user_and_no_copies():
    class Counts(list):
        def __call__(self, row):
            self.append(row["step"])

    seen = Counts()
    sp.tune(*setup(), TRAIN, HELD_OUT, search={"lr": [1e-3, 1e-2]}, num_trials=2, callbacks=[seen], **SHORT)
    assert seen == [0, 1, 2, 3] * 2


def test_optuna_chooses_where_it_is_asked_for():
    optuna = pytest.importorskip("optuna")
    verbosity = optuna.logging.get_verbosity()
    space = {"lr": (1e-3, 1e-1), "num_steps": (2, 6), "guide": ["normal", "delta"]}
    options = {"batch_size": 4, "progress": False}
    own = optuna.samplers.RandomSampler(seed=1)
    for sampler in ("optuna", own):
        found = sp.tune(*setup(), TRAIN, HELD_OUT, search=space, num_trials=5, sampler=sampler, **options)
        assert found.trials["lr"].between(1e-3, 1e-1).all() and found.trials["num_steps"].between(2, 6).all()
        assert found.trials["lr"].iloc[0] == 8e-3 and found.trials["lr"].nunique() == 5
        assert found.best["guide"] in ("normal", "delta")
    again = sp.tune(*setup(), TRAIN, HELD_OUT, search=space, num_trials=5, sampler="optuna", **options)
    once = sp.tune(*setup(), TRAIN, HELD_OUT, search=space, num_trials=5, sampler="optuna", **options)
    assert again.trials["eval_nll"].equals(once.trials["eval_nll"])
    assert optuna.logging.get_verbosity() == verbosity


def test_the_tpe_sampler_learns_from_the_scores(monkeypatch):
    """The scores are those of a function of the rate, so that the trials cost nothing."""
    pytest.importorskip("optuna")
    from scalabl_pyro.training import tune as module

    def score(adapter, starts, rows, chosen, *, seed):
        return {
            **chosen,
            "eval_nll": abs(math.log(chosen["lr"] / 1e-2)),
            "step": 0,
            "state": "complete",
            "reason": None,
        }

    monkeypatch.setattr(module, "_run", score)
    blora, task = setup()
    space = {"lr": (1e-6, 1e0)}
    found = sp.tune(blora, task, TRAIN, HELD_OUT, search=space, num_trials=60, sampler="optuna", progress=False)
    early, late = found.trials["eval_nll"].iloc[1:11].mean(), found.trials["eval_nll"].iloc[-10:].mean()
    assert late < early / 2


def test_random_values_have_equal_density_of_their_logarithms():
    values = [Range(1e-4, 1e-2, is_whole=False).draw(np.random.default_rng(k)) for k in range(2000)]
    logs = np.log10(values)
    assert abs(logs.mean() + 3) < 5 * 2 / math.sqrt(12 * 2000)
    whole = {Range(1, 3, is_whole=True).draw(np.random.default_rng(k)) for k in range(200)}
    assert whole == {1, 2, 3} and all(isinstance(value, int) for value in whole)


def test_the_space_is_read():
    assert search_space({"lr": (1e-3, 1e-2), "guide": ["normal"]}) == {
        "lr": Range(1e-3, 1e-2, False),
        "guide": ["normal"],
    }
    options = {"optimizer": sp.OptimizerOptions(warmup=0.5), "lr": 1.0}
    joined = arguments_of({"optimizer.lr_scale": 0.1}, options)
    assert joined["optimizer"]["warmup"] == 0.5 and joined["optimizer"]["lr_scale"] == 0.1
    assert options["optimizer"].lr_scale == 3e-2


@pytest.mark.parametrize(
    ("search", "kind", "text"),
    [
        ({"lr": (1e-2, 1e-3)}, ValueError, r"search\['lr'\]=\(0.01, 0.001\): expected two finite numbers"),
        ({"lr": (0.0, 1e-3)}, ValueError, "0 < low < high"),
        ({"lr": (1e-3, math.inf)}, ValueError, "two finite numbers"),
        ({"lr": []}, ValueError, r"search\['lr'\] is an empty list"),
        ({"lr": 1e-3}, TypeError, r"search\['lr'\] is .*expected two numbers \(low, high\), or a list"),
        ({"lr": (1e-3, 1e-2, 1e-1)}, TypeError, "expected two numbers"),
        ({"learning_rate": [1e-3]}, ValueError, "no argument of fit"),
        ({"optimizer.lr_scal": [1e-3]}, ValueError, "Did you mean 'optimizer.lr_scale'"),
        ({"eval_data": [[]]}, ValueError, "trials with other rows cannot be compared"),
        ({"seed": [0, 1]}, ValueError, "the best of several seeds is luck"),
        ({}, ValueError, "search is empty"),
        ([("lr", 1e-3)], TypeError, "expected a dict"),
    ],
    ids=range(12),
)
def test_a_space_that_cannot_be_searched_is_named_before_anything_runs(search, kind, text):
    with pytest.raises(kind, match=text):
        sp.tune(*setup(), TRAIN, HELD_OUT, search=search, **SHORT)


def test_other_mistakes_are_named(monkeypatch):
    blora, task = setup()
    with pytest.raises(ValueError, match="num_trials=0"):
        sp.tune(blora, task, TRAIN, HELD_OUT, num_trials=0)
    with pytest.raises(ValueError, match="reset= cannot be passed to tune: each trial starts afresh"):
        sp.tune(blora, task, TRAIN, HELD_OUT, reset=True)
    with pytest.raises(ValueError, match="answer"):
        sp.tune(blora, task, TRAIN, [{"question": "a", "choices": ["b", "c"]}], search={"lr": [1e-3]}, **SHORT)
    with pytest.raises(TypeError, match=r"sampler is .*expected 'random', 'optuna'"):
        pytest.importorskip("optuna")
        sp.tune(blora, task, TRAIN, HELD_OUT, sampler=3)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ImportError, match="needs Optuna: pip install optuna, or use 'random'"):
        sp.tune(blora, task, TRAIN, HELD_OUT, sampler="optuna")
