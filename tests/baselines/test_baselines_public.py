"""The public names of baselines: they are unambiguous, have an example that runs, and print themselves shortly."""

import importlib.util
import inspect
import itertools

import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro import baselines
from scalabl_pyro.baselines.factor_posterior import NOISES, FactorPosterior
from scalabl_pyro.baselines.saving import KINDS

ROWS = tiny.question_rows(8)
FEW = {"num_steps": 2, "batch_size": 4, "progress": False, "lora": {"r": 2}}


def task():
    return sp.MultipleChoice(tiny.tokenizer())


@pytest.fixture(scope="module")
def point():
    return baselines.mle(tiny.causal_lm(), task(), ROWS, **FEW).posterior


@pytest.mark.parametrize("name", baselines.__all__)
def test_no_public_name_is_the_name_of_a_file(name):
    assert importlib.util.find_spec(f"scalabl_pyro.baselines.{name}") is None or name == "load"
    assert not inspect.ismodule(getattr(baselines, name))


def test_the_old_name_of_weight_noise_works_for_a_release():
    with pytest.warns(DeprecationWarning, match="FactorNoise is now called WeightNoise"):
        assert baselines.FactorNoise is baselines.WeightNoise
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = baselines.Nothing


def test_the_words_in_saved_files_stay():
    assert set(NOISES) == {"dropout", "kronecker", "normal", "spectral"}
    assert set(KINDS) == {"ensemble", "factors", "temperature"}


# repr -------------------------------------------------------------------------------------------------------


def test_results_and_predictors_print_at_most_four_lines_and_no_tensor(point):
    scales = tuple(torch.full_like(A, 0.25) for A, _ in point.factors)
    normal = FactorPosterior(point, baselines.NormalNoise(scales), {"method": "BLoB"})
    made = {
        "dropout": baselines.mc_dropout(tiny.causal_lm(), task(), ROWS, p=0.3, **FEW),
        "ensemble": baselines.deep_ensemble(tiny.causal_lm(), task(), ROWS, num_members=2, **FEW),
        "normal": normal,
        "laplace": baselines.laplace_lora(point, ROWS, prior_scale=0.1),
        "temperature": baselines.TemperatureScaled(normal, 1.5),
    }
    texts = {name: repr(value) for name, value in made.items()}
    for text in texts.values():
        assert "tensor" not in text
        assert len(text) < 400
        assert len(text.splitlines()) <= 4
    layers = len(point.adapter.layers)
    assert "history=2 steps" in texts["dropout"]
    assert "noise=DropoutNoise(p=0.3)" in texts["dropout"]
    assert "members=2 x Posterior" in texts["ensemble"]
    expected = f"NormalNoise(layers={layers}, scales=0.25 to 0.25), layers={layers}, task=MultipleChoice)"
    assert texts["normal"] == f"FactorPosterior(method='BLoB', noise={expected}"
    assert f"KroneckerNoise(layers={layers}, prior_scale=0.1, linearized=True)" in texts["laplace"]
    assert (
        texts["temperature"]
        == f"TemperatureScaled(temperature=1.5, base=FactorPosterior, layers={layers}, task=MultipleChoice)"
    )


# errors -----------------------------------------------------------------------------------------------------


def test_dropout_that_diverges_returns_its_own_posterior(llm):
    poisoned = itertools.chain([1.0, 1.0], itertools.repeat(float("nan")))
    diverging = task()
    likelihood = diverging.likelihood
    diverging.likelihood = lambda outputs, batch: likelihood(outputs * next(poisoned), batch)
    with pytest.raises(sp.TrainingError) as caught:
        baselines.mc_dropout(llm, diverging, ROWS, **{**FEW, "num_steps": 5})
    assert isinstance(caught.value.result, baselines.BaselineResult)
    assert isinstance(caught.value.result.posterior.noise, baselines.DropoutNoise)
