"""Threads may sample, predict, fit and load at the same time: each gets to the last bit what it gets alone."""

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from pyro.infer import autoguide

import scalabl_pyro as sp

ROWS, TEXTS = tiny.question_rows(12), [{**row, "label": float(row["label"])} for row in tiny.text_rows(12)]
SECONDS = 60


@pytest.fixture(autouse=True)
def frequent_switches():
    """Python changes threads every few bytecodes, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Results of the jobs, each in a thread of its own, started at once; an error in any is raised here."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            barrier.wait(SECONDS)
            results[i] = jobs[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]
    return results


def shown(prediction: Any) -> list[np.ndarray]:
    names = ("log_probs", "means", "variances", "replicates", "log_density")
    return [getattr(prediction, name) for name in names if hasattr(prediction, name)]


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def learned(llm: torch.nn.Module, task: sp.Task, rows: list[dict], **options: Any) -> sp.Posterior:
    blora = sp.bayesian_lora(llm, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    return sp.fit(blora, task, rows, num_steps=3, lr=0.05, progress=False, **options).posterior


def dropping(llm: torch.nn.Module) -> torch.nn.Module:
    """In train mode and with dropout, which would be in a prediction whose modes another one restores too early."""
    for module in llm.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return llm.train()


@pytest.fixture(scope="module")
def choice():
    """Posterior of a causal LM."""
    return learned(dropping(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer()), ROWS)


@pytest.fixture(scope="module")
def number():
    """Posterior of a regression, whose predictions draw answers too."""
    return learned(dropping(tiny.classifier(num_labels=1)), sp.Regression(tiny.tokenizer()), TEXTS)


@pytest.mark.parametrize("repeats", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_predictions_with_different_draws_on_one_module(choice, number, repeats):
    jobs, expected = [], []
    for posterior, rows in ((choice, ROWS), (number, TEXTS)):
        for seed in range(3):

            def job(posterior=posterior, rows=rows, seed=seed):
                return shown(posterior.predict(rows, num_draws=3, seed=seed, batch_size=5))

            jobs.append(job)
            expected.append(job())
    assert not np.array_equal(expected[0][0], expected[1][0])
    for _ in range(repeats):
        for found, alone in zip(together(*jobs), expected, strict=True):
            assert_equal(found, alone)
    assert all(m.training for m in choice.adapter.module.modules())


@pytest.mark.parametrize("guide", ["flow", autoguide.AutoNormal, "svgd"], ids=str)
def test_two_posteriors_on_one_module(choice, guide):
    other = sp.refit(choice, ROWS, guide=guide, num_steps=2, progress=False).posterior
    jobs = [lambda p=p: shown(p.predict(ROWS, num_draws=2)) for p in (choice, other, choice, other)]
    expected = [job() for job in jobs]
    assert not np.array_equal(expected[0][0], expected[1][0])
    for found, alone in zip(together(*jobs), expected, strict=True):
        assert_equal(found, alone)


def test_everything_a_posterior_offers_at_once(choice, number):
    jobs = [
        lambda: [choice.sample(20, seed=3).s],
        lambda: [number.sample(20, seed=3).log_q],
        lambda: shown(choice.predict(ROWS)),
        lambda: shown(choice.predict_linearized(ROWS, num_draws=5)),
        lambda: shown(number.predict_linearized(TEXTS, num_draws=5)),
        lambda: shown(choice.prior_predictive(ROWS, num_draws=3)),
        lambda: [choice.log_weights(ROWS, num_draws=4).log_likelihood],
        lambda: [number.log_weights(TEXTS, num_draws=4).log_prior],
        lambda: [sp.laplace(number, TEXTS).sample(2).s],
        lambda: shown(sp.baselines.laplace_lora(choice, ROWS[:4]).predict(ROWS, num_draws=2)),
        lambda: shown(sp.baselines.temperature_scaling(choice, ROWS, num_draws=2).predict(ROWS, num_draws=2)),
        lambda: [choice.mean(), choice.summary(num_draws=5).to_numpy()],
    ]
    expected = [job() for job in jobs]
    for found, alone in zip(together(*jobs), expected, strict=True):
        assert_equal(found, alone)


def test_draws_bound_by_hand_stay_in_their_thread(choice):
    ids = torch.tensor([[3, 4, 5, 6]])
    choice.adapter.module.eval()  # a plain call of the module is the caller's own

    @torch.no_grad()
    def job(index: int | None) -> Any:
        out = []
        for _ in range(5):
            with choice.draw(index) as llm:
                out.append(llm(input_ids=ids).logits)
        return out

    jobs = [lambda i=i: job(i) for i in (None, 0, 1, 2)]
    expected = [job() for job in jobs]
    for found, alone in zip(together(*jobs), expected, strict=True):
        assert_equal(found, alone)
    choice.adapter.module.train()


class Stops(sp.MultipleChoice):
    """Sets ``inside`` when a prediction reaches it, and waits there until ``go_on`` is set."""

    def __init__(self, tokenizer, **options):
        super().__init__(tokenizer, **options)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __deepcopy__(self, memo):
        return self

    def outputs(self, llm, batch, s):
        self.inside.set()
        assert self.go_on.wait(SECONDS)
        return super().outputs(llm, batch, s)


def started(job: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(job()), daemon=True)
    thread.start()
    return thread, result


def with_task(posterior: sp.Posterior, task: sp.Task) -> sp.Posterior:
    return sp.Posterior(**{**vars(posterior), "task": task})


def test_prediction_that_ends_first_leaves_the_modes_of_one_that_still_runs(choice):
    expected = shown(choice.predict(ROWS))
    task = Stops(tiny.tokenizer())
    thread, result = started(lambda: shown(with_task(choice, task).predict(ROWS)))
    assert task.inside.wait(SECONDS)
    assert_equal(shown(choice.predict(ROWS)), expected)  # comes and goes meanwhile
    assert not any(m.training for m in choice.adapter.module.modules())
    task.go_on.set()
    thread.join(SECONDS)
    assert_equal(result[0], expected)
    assert all(m.training for m in choice.adapter.module.modules())


def test_unload_is_refused_while_a_thread_predicts():
    llm = tiny.causal_lm()
    posterior = learned(llm, sp.MultipleChoice(tiny.tokenizer()), ROWS)
    expected = shown(posterior.predict(ROWS))
    blora, task = posterior.blora(), Stops(tiny.tokenizer())
    thread, result = started(lambda: shown(with_task(posterior, task).predict(ROWS)))
    assert task.inside.wait(SECONDS)
    with pytest.raises(RuntimeError, match="another thread uses it for a prediction"):
        blora.unload()
    task.go_on.set()
    thread.join(SECONDS)
    assert_equal(result[0], expected)
    assert_equal(shown(posterior.predict(ROWS)), expected)
    posterior.blora().unload()
    with pytest.raises(RuntimeError, match="was unloaded"):
        posterior.predict(ROWS)


def test_unload_is_refused_while_a_thread_trains():
    posterior = learned(tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), ROWS)
    blora, task = posterior.blora(), Stops(tiny.tokenizer())
    thread, result = started(lambda: sp.fit(blora, task, ROWS, num_steps=1, progress=False))
    assert task.inside.wait(SECONDS)
    with pytest.raises(RuntimeError, match="another thread uses it for a training"):
        blora.unload()
    task.go_on.set()
    thread.join(SECONDS)
    assert result


@pytest.mark.parametrize("context", ["a draw", "a disabled adapter", "a callback"])
def test_unload_is_refused_inside_a_context_of_its_own_thread(context):
    posterior = learned(tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), ROWS)
    message = "an open context of this thread uses it"

    def unload(row=None):
        with pytest.raises(RuntimeError, match=message):
            posterior.blora().unload()

    if context == "a draw":
        with posterior.draw(0):
            unload()
    elif context == "a disabled adapter":
        with posterior.blora().disabled():
            unload()
    else:
        sp.fit(posterior.blora(), posterior.task, ROWS, num_steps=1, callbacks=[unload], progress=False)
    posterior.blora().unload()


def test_training_waits_for_a_prediction_on_its_module_and_the_next_prediction_for_it():
    def start() -> tuple[sp.Posterior, sp.BayesianLoRA]:
        posterior = learned(dropping(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer()), ROWS)
        return posterior, posterior.blora()

    def train(blora: sp.BayesianLoRA) -> sp.FitResult:
        return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=3, seed=1, progress=False)

    posterior, blora = start()
    alone = [train(blora).history.loss.tolist(), shown(posterior.predict(ROWS))]

    posterior, blora = start()
    task = Stops(tiny.tokenizer())
    predicting, predicted = started(lambda: shown(with_task(posterior, task).predict(ROWS)))
    assert task.inside.wait(SECONDS)
    training, trained = started(lambda: train(blora).history.loss.tolist())
    training.join(0.3)
    assert training.is_alive() and not trained
    task.go_on.set()
    for thread in (predicting, training):
        thread.join(SECONDS)
    assert_equal(predicted[0], alone[1])
    assert trained[0] == alone[0]
    assert_equal(shown(posterior.predict(ROWS)), alone[1])


def test_predictions_inside_a_callback_of_a_fit(choice):
    expected = shown(choice.predict(ROWS, num_draws=2))
    seen, modes = [], []

    def callback(row):
        seen.append(shown(choice.predict(ROWS, num_draws=2)))
        modes.append([d.training for layer in choice.adapter.layers for d in layer.lora_dropout.values()])

    sp.fit(choice.blora(), choice.task, ROWS, num_steps=2, callbacks=[callback], progress=False)
    assert len(seen) == 2 and all(all(m) for m in modes)  # dropout of the factors goes on
    for found in seen:
        assert_equal(found, expected)


def test_fits_on_modules_of_their_own_give_what_they_give_alone():
    def job(llm: torch.nn.Module, seed: int, guide: Any) -> list[Any]:
        blora = sp.bayesian_lora(llm, r=2, seed=seed)
        task = sp.MultipleChoice(tiny.tokenizer())
        result = sp.fit(blora, task, ROWS, guide=guide, num_steps=3, lr=0.05, seed=seed, progress=False)
        return [result.history.loss.to_numpy(), result.posterior.sample(3).s]

    def jobs() -> list[Callable[[], Any]]:
        """On new models, made before the threads start: transformers draws weights from the global generator."""
        guides = ["normal", autoguide.AutoNormal, "flow"]
        return [partial(job, tiny.causal_lm(), seed, guide) for seed, guide in enumerate(guides)]

    expected = [job() for job in jobs()]
    for found, alone in zip(together(*jobs()), expected, strict=True):
        assert_equal(found, alone)


def test_other_models_predict_and_train_while_a_fit_runs(choice):
    """A fit holds the lock of the process per step, so another thread need not wait for its end."""
    expected = shown(choice.predict(ROWS, num_draws=2))

    def train(seed: int, **options: Any) -> list[float]:
        blora, task = sp.bayesian_lora(models[seed], seed=seed), sp.MultipleChoice(tiny.tokenizer())
        return sp.fit(blora, task, ROWS, seed=seed, progress=False, **options).history.loss.tolist()

    models = [tiny.causal_lm(seed=seed) for seed in range(2)]
    short = train(1, num_steps=5)
    models[1] = tiny.causal_lm(seed=1)
    done = threading.Event()
    steps_after: list[int] = []

    def wait_for_others(row: dict[str, float]) -> bool:
        """Train until the other thread is done, and three steps more."""
        steps_after.extend([int(row["step"])] if done.is_set() else [])
        return len(steps_after) == 3

    def others() -> list[Any]:
        found = [shown(choice.predict(ROWS, num_draws=2)), train(1, num_steps=5)]
        done.set()
        return found

    long, (predicted, trained) = together(
        lambda: train(
            0, num_steps=100_000, callbacks=[wait_for_others], optimizer={"schedule": "constant", "warmup": 0.0}
        ),
        others,
    )
    assert len(steps_after) == 3  # the fit was not over when the others ended
    assert_equal(predicted, expected)
    assert trained == short
    models[0] = tiny.causal_lm(seed=0)
    alone = train(
        0,
        num_steps=100_000,
        callbacks=[lambda row: row["step"] == len(long) - 1],
        optimizer={"schedule": "constant", "warmup": 0.0},
    )
    assert alone == long


def test_loading_into_one_module_from_several_threads_attaches_the_layers_once(tmp_path, choice):
    choice.save_pretrained(tmp_path / "p")
    expected = [shown(choice.predict(ROWS, num_draws=2))]
    llm = tiny.causal_lm()
    jobs = [lambda: sp.Posterior.from_pretrained(llm, tmp_path / "p")] * 4
    posteriors = together(*jobs)
    assert len({id(p.adapter) for p in posteriors}) == 1
    for posterior in posteriors:
        assert_equal([shown(posterior.predict(ROWS, num_draws=2))], expected)


def test_an_error_in_one_thread_leaves_modes_and_locks_to_the_others(choice):
    expected = shown(choice.predict(ROWS))

    def fails() -> None:
        with pytest.raises(ValueError, match="Row 0"):
            choice.predict([{"question": "what ?"}])
        with pytest.raises(ZeroDivisionError):
            with_task(choice, Broken(tiny.tokenizer())).predict(ROWS)

    for found in together(fails, lambda: shown(choice.predict(ROWS)), fails, lambda: shown(choice.predict(ROWS))):
        if found is not None:
            assert_equal(found, expected)
    assert all(m.training for m in choice.adapter.module.modules())


class Broken(sp.MultipleChoice):
    """Fails in the middle of a prediction."""

    def likelihood(self, outputs, batch):
        raise ZeroDivisionError
