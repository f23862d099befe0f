"""Averages over draws that are not kept: the values of the full prediction, in memory that does not grow with S."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny
import torch
import toys

import scalabl_pyro as sp
from scalabl_pyro.guides import CovarianceGuide, DeltaGuide, EmpiricalGuide, Guide, MixtureGuide, NormalGuide
from scalabl_pyro.prediction.averaged import AveragedNumericPrediction, AveragedPrediction
from scalabl_pyro.prediction.averages import ClassAverages, NumberAverages
from scalabl_pyro.prediction.predict import MANY_DRAWS, DrawOutputs

matplotlib.use("Agg")
ROWS = tiny.question_rows(7, seed=9)
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
CLASSES = (
    "probs",
    "labels",
    "total",
    "aleatoric",
    "epistemic",
    "target",
    "is_answered",
    "classes",
    "num_draws",
    "log_mixture",
)
NUMBERS = (
    "mean",
    "total",
    "aleatoric",
    "epistemic",
    "epistemic_corrected",
    "target",
    "is_answered",
    "num_draws",
    "log_mixture",
)


def fitted(model, task, rows, **options):
    """A posterior in float64 whose draws differ visibly."""
    blora = sp.bayesian_lora(model, r=2)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    options = {"num_steps": 2, "init_scale": 0.5, "batch_size": 8, "progress": False, **options}
    return sp.fit(blora, task, rows, **options).posterior


@pytest.fixture(scope="module")
def posterior():
    model = tiny.causal_lm(dtype=torch.float64)
    return fitted(model, sp.MultipleChoice(tiny.tokenizer()), tiny.question_rows(16))


@pytest.fixture(scope="module")
def numbers():
    toy = toys.LinearToy(num_data=16)
    options = {"num_steps": 2, "init_scale": 0.5, "progress": False}
    return sp.fit(toy.blora, toys.LinearGaussian(), toy.rows, **options).posterior, toy.rows


def assert_same(averaged, full, names):
    for name in (*names, "log_mixture"):
        value, expected = getattr(averaged, name), getattr(full, name)
        if isinstance(expected, np.ndarray):
            np.testing.assert_allclose(value, expected, **TOLERANCE, err_msg=name)
        else:
            assert value == expected, name


@pytest.mark.parametrize(
    ("num_draws", "options"),
    [
        (0, {}),
        (1, {}),
        (7, {"batch_size": 3, "draws_per_pass": 3}),
        (8, {"batch_size": 2, "draws_per_pass": 4, "design": "antithetic"}),
        (7, {"draws_per_pass": 3, "design": "antithetic"}),  # a part ends between the two of a pair
        (11, {"draws_per_pass": 4, "design": "sobol"}),
        (MANY_DRAWS + 3, {}),
        (5, {"draws_per_pass": 100}),
    ],
)
def test_averages_are_those_of_the_prediction_that_keeps_its_draws(posterior, num_draws, options):
    full = posterior.predict(ROWS, num_draws=num_draws, seed=3, **options)
    averaged = posterior.predict(ROWS, num_draws=num_draws, seed=3, keep_draws=False, **options)
    assert isinstance(averaged, AveragedPrediction)
    assert_same(averaged, full, CLASSES)
    np.testing.assert_allclose(averaged.metrics(bootstrap=5), full.metrics(bootstrap=5), **TOLERANCE)
    assert averaged.to_frame().round(10).equals(full.to_frame().round(10))
    if num_draws > 1:
        assert full.epistemic.max() > 1e-4  # draws differ, so that wrong draws would not pass


@pytest.mark.parametrize(("num_draws", "size"), [(0, None), (1, None), (7, 3), (150, None), (4, 100)])
def test_averages_of_numbers_are_those_of_the_prediction_that_keeps_its_draws(numbers, num_draws, size):
    posterior, rows = numbers
    rows = [*rows[:6], {**rows[6], "y": None}]
    options = {"num_draws": num_draws, "seed": 2, "draws_per_pass": size, "batch_size": 4}
    full, averaged = posterior.predict(rows, **options), posterior.predict(rows, keep_draws=False, **options)
    assert isinstance(averaged, AveragedNumericPrediction)
    assert_same(averaged, full, NUMBERS)
    np.testing.assert_allclose(averaged.metrics(bootstrap=5), full.metrics(bootstrap=5), **TOLERANCE)
    table = averaged.to_frame()
    np.testing.assert_allclose(table, full.to_frame()[table.columns], **TOLERANCE)
    if num_draws > 1:
        assert full.epistemic.min() > 1e-4


@pytest.mark.parametrize("known", [(), (0, 2), range(7)])
def test_rows_without_an_answer_do_not_count(posterior, known):
    rows = [row if i in known else {k: v for k, v in row.items() if k != "answer"} for i, row in enumerate(ROWS)]
    options = {"num_draws": 5, "draws_per_pass": 2, "batch_size": 1}
    full, averaged = posterior.predict(rows, **options), posterior.predict(rows, keep_draws=False, **options)
    assert_same(averaged, full, CLASSES)
    if not known:
        with pytest.raises(ValueError, match="These rows have no answers"):
            averaged.metrics()
        assert averaged.target is None and averaged.log_mixture is None
        return
    assert len(averaged.with_answers().probs) == len(known)
    np.testing.assert_allclose(averaged.metrics(), full.metrics(), **TOLERANCE)


def test_answers_that_no_float_can_hold_keep_their_nll(posterior):
    """Probabilities of exp(-800) are 0 as floats; the log of their average is not."""
    averages = ClassAverages(np.array([1]), 1, 2)
    for part in ([-800.0, -801.0], [-802.0]):
        log_probs = np.array([[[np.log1p(-np.exp(v)), v]] for v in part])
        averages.add(np.array([0]), {"log_probs": log_probs})
    expected = np.logaddexp.reduce([-800.0, -801.0, -802.0]) - np.log(3)
    assert averages.over(3)["log_mixture"][0] == pytest.approx(expected, rel=1e-12)
    assert averages.over(3)["probs"][0, 1] == 0


def test_the_variance_of_means_survives_a_large_offset():
    values = np.random.default_rng(0).normal(1e8, 1.0, size=(1000, 3))
    averages = NumberAverages(3, are_answered=False)
    for start in range(0, 1000, 7):
        part = values[start : start + 7]
        averages.add(np.arange(3), {"means": part, "variances": np.ones_like(part)})
    np.testing.assert_allclose(averages.over(1000)["epistemic"], values.var(0), rtol=1e-7)


def test_what_needs_single_draws_says_why_it_is_not_there(posterior, numbers):
    averaged = posterior.predict(ROWS, num_draws=3, keep_draws=False)
    for name in ("log_probs", "log_likelihood", "epistemic_corrected"):
        with pytest.raises(AttributeError, match=rf"'{name}', which needs single draws.*keep_draws=True"):
            getattr(averaged, name)
        assert not hasattr(averaged, name)
    with pytest.raises(AttributeError, match="has no attribute 'probz'"):
        averaged.probz  # noqa: B018
    with pytest.raises(AttributeError, match=r"'interval', which needs single draws"):
        numbers[0].predict(numbers[1], keep_draws=False).interval()
    needs = "It holds averages only, and this needs single draws: predict with keep_draws=True."
    with pytest.raises(TypeError, match=needs):
        posterior.to_arviz(num_draws=3, prediction=averaged)
    with pytest.raises(TypeError, match=needs):
        sp.baselines.temperature_scaling(averaged, averaged)
    with pytest.raises(TypeError, match=r"keep_draws='no': expected True or False"):
        posterior.predict(ROWS, keep_draws="no")
    assert "draws=3" in repr(averaged) and "rows=7" in repr(averaged)
    assert np.array_equal(pickle.loads(pickle.dumps(averaged)).probs, averaged.probs)


def test_plots_that_read_averages_take_it(posterior):
    full, averaged = (posterior.predict(ROWS, num_draws=3, keep_draws=keep) for keep in (True, False))
    for draw in (sp.plots.reliability, lambda p: sp.plots.risk_coverage(p, uncertainty="epistemic")):
        lines = [[line.get_xydata() for line in draw(p).lines] for p in (full, averaged)]
        for one, other in zip(*lines, strict=True):
            np.testing.assert_allclose(one, other, **TOLERANCE)
    assert sp.plots.uncertainty_histogram(averaged, full).get_title() == "OOD AUROC 0.500"


class Loops(NormalGuide):
    """A family with its own way to draw."""

    def sample_and_log_prob(self, num_draws, *, seed):
        sites, _ = super().sample_and_log_prob(num_draws, seed=seed)
        return {"s": 2 * sites["s"]}, None


LOC, SCALE = torch.linspace(-1, 1, 6), torch.linspace(0.1, 0.5, 6)
GUIDES = {
    "normal": lambda: NormalGuide(LOC, SCALE),
    "covariance": lambda: CovarianceGuide(LOC, SCALE),
    "delta": lambda: DeltaGuide(LOC),
    "points": lambda: EmpiricalGuide({"s": torch.randn(5, 6, generator=torch.Generator().manual_seed(0))}),
    "mixture": lambda: MixtureGuide([NormalGuide(LOC, SCALE), NormalGuide(-LOC, SCALE)]),
    "own": lambda: Loops(LOC, SCALE),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_parts_are_the_draws_of_sample_bit_for_bit(name, size):
    guide: Guide = GUIDES[name]()
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(7)
        expected = [float(torch.randn(())) for _ in range(3)]
        torch.manual_seed(7)
        own = []
        for part in guide.sample_in_parts(13, size=size, seed=4):
            parts.append(part["s"])
            own.append(float(torch.randn(())))  # what the caller draws meanwhile, and what the guide draws, stay apart
        assert own[:3] == expected[: len(own)]
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts), guide.sample(13, seed=4)["s"])


def test_draws_beyond_one_part_are_those_of_one_pass_and_have_their_densities():
    guide = NormalGuide(LOC, SCALE)
    sites, log_q = guide.sample_and_log_prob(2500, seed=1)
    assert torch.equal(sites["s"][:3], guide.sample(3, seed=1)["s"])
    expected = torch.distributions.Normal(LOC, SCALE).log_prob(sites["s"]).sum(-1)
    torch.testing.assert_close(log_q, expected)
    assert sites["s"].unique(dim=0).shape[0] == 2500


def test_a_pass_on_a_cpu_has_64_draws_at_most_unless_the_caller_asks_for_more(posterior, monkeypatch):
    sizes = []
    original = DrawOutputs.__call__
    monkeypatch.setattr(DrawOutputs, "__call__", lambda self, *given: sizes.append(self.size) or original(self, *given))
    posterior.predict(ROWS[:1], num_draws=70)
    posterior.predict(ROWS[:1], num_draws=70, keep_draws=False)
    posterior.predict(ROWS[:1], num_draws=70, draws_per_pass=66)
    assert sizes == [64, 64, 64, 66]


MEASURE = """
import gc, sys, threading, time
sys.path.insert(0, {helpers!r})
import psutil, torch, toys
import scalabl_pyro as sp
torch.set_num_threads(1)
toy = toys.LinearToy(num_data=64)
posterior = sp.fit(toy.blora, toys.LinearGaussian(), toy.rows, num_steps=1, progress=False).posterior
memory = psutil.Process().memory_info
def rise(count, keep):
    gc.collect()
    before, peak, ended = memory().rss, [0], threading.Event()
    def watch():
        while not ended.wait(0.002):
            peak[0] = max(peak[0], memory().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    prediction = posterior.predict(toy.rows, num_draws=count, keep_draws=keep, draws_per_pass=200, batch_size=64)
    ended.set()
    watcher.join()
    return (max(peak[0], memory().rss) - before) // 1024
rise(400, True), rise(400, False)
print(rise(20_000, False), rise(8_000, True))
"""


def test_twenty_thousand_draws_take_the_memory_of_four_hundred():
    """The memory of the process stays where averages are kept, and rises with 8,000 draws that are kept."""
    code = MEASURE.format(helpers=str(Path(toys.__file__).parent))
    # Arrays of 64 KiB and more go back to the system as soon as they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    averaged, kept = (int(kilobytes) / 1024 for kilobytes in found.stdout.split())
    assert averaged < 8, f"{averaged:.0f} MiB"
    assert kept > 16, f"{kept:.0f} MiB: the measurement cannot see what it is about"
