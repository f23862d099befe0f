"""The whole way through the library once, in under a minute: it runs with the lowest and the newest versions.

`make test-lowest` and `make test-newest` run this file in environments of their own, with pytest alone.
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import arviz as az
import h5py
import matplotlib
import numpy as np
import pytest
import tiny
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import scalabl_pyro as sp
from scalabl_pyro.cli import main as cli

matplotlib.use("Agg")
pytestmark = pytest.mark.smoke
ROOT = Path(__file__).parents[2]
ROWS = tiny.question_rows(32)


@pytest.fixture(scope="module")
def result():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=4)
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, ROWS, num_steps=60, lr=2e-2, lr_A=2e-2, batch_size=16, progress=False)


def test_a_fit_learns_and_predicts(result):
    losses = result.history["loss"]
    assert losses[-10:].mean() < losses[:10].mean()
    prediction = result.posterior.predict(ROWS, num_draws=10)
    np.testing.assert_allclose(prediction.probs.sum(1), 1, rtol=1e-5)
    table = prediction.metrics(bootstrap=10)
    assert np.isfinite(table.loc["value", ["accuracy", "nll", "ece", "brier"]].to_numpy(dtype=float)).all()
    averaged = result.posterior.predict(ROWS, num_draws=10, keep_draws=False)
    np.testing.assert_allclose(averaged.probs, prediction.probs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guide", ["lowrank", "full_covariance", "flow", "delta"])
def test_other_guides_fit(guide):
    blora = sp.bayesian_lora(tiny.causal_lm("qwen2"), r=2)
    task = sp.MultipleChoice(tiny.tokenizer())
    fitted = sp.fit(blora, task, ROWS, guide=guide, num_steps=3, batch_size=8, progress=False)
    assert torch.isfinite(fitted.posterior.sample(3).s).all()


def test_a_classifier_of_rows_in_a_dataset_fits():
    from datasets import Dataset

    data = Dataset.from_list(tiny.text_rows(12))
    blora = sp.bayesian_lora(tiny.classifier("bert"), r=2)
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    posterior = sp.fit(blora, task, data, num_steps=2, batch_size=8, progress=False).posterior
    assert posterior.predict(data, num_draws=2).probs.shape == (12, 3)


def test_a_saved_posterior_predicts_the_same(result, tmp_path):
    result.posterior.save_pretrained(tmp_path / "posterior")
    again = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "posterior")
    expected = result.posterior.predict(ROWS, num_draws=3).log_probs
    np.testing.assert_allclose(again.predict(ROWS, num_draws=3).log_probs, expected, rtol=1e-5, atol=1e-6)


def test_arviz_reads_writes_and_plots_what_is_exported(result, tmp_path):
    posterior = result.posterior
    prediction = posterior.predict(ROWS, num_draws=50)
    data = posterior.to_arviz(num_draws=50, prediction=prediction, prior=True)
    table = az.summary(data)
    assert len(table) == posterior.subspace.dim
    assert np.isfinite(float(getattr(az.loo(data), "elpd", None) or az.loo(data)["elpd_loo"]))
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    with h5py.File(tmp_path / "posterior.nc") as file:
        assert {"posterior", "log_likelihood"} <= set(file)
    assert posterior.loo(ROWS, num_draws=50).elpd < 0
    if Version(metadata.version("arviz")) < Version("1.0"):
        az.plot_forest(data)
    else:
        az.plot_forest(data, backend="matplotlib")


def test_plots_draw(result):
    posterior = result.posterior
    prediction = posterior.predict(ROWS, num_draws=5)
    for axes in (
        sp.plots.history(result.history),
        sp.plots.reliability(prediction),
        sp.plots.risk_coverage(prediction),
        sp.plots.posterior_by_layer(posterior, num_draws=50),
    ):
        axes.figure.canvas.draw()
        assert axes.get_xlabel() or axes.get_ylabel()


def test_laplace_refit_and_diagnosis(result):
    normal = sp.laplace(result.posterior, ROWS, prior_scale="evidence")
    assert np.isfinite(normal.provenance["laplace_log_evidence"])
    assert str(result.posterior.diagnose(ROWS, history=result.history, num_draws=50))
    assert sp.refit(normal, ROWS, num_steps=3, progress=False).posterior.predict(ROWS).num_draws == 10


def test_nuts_samples_and_exports():
    blora = sp.bayesian_lora(tiny.causal_lm(), r=1, target_modules=["q_proj"])
    posterior = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=2, progress=False).posterior
    chains = sp.mcmc(posterior, ROWS[:8], num_samples=10, warmup_steps=5, num_chains=2, max_tree_depth=3)
    assert chains.to_arviz()["posterior"].sizes["draw"] == 10


def test_the_module_comes_back_bit_for_bit():
    llm = tiny.causal_lm()
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    blora = sp.bayesian_lora(llm)
    sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=2, progress=False)
    after = blora.unload().state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_the_doctor_finds_nothing_wrong(capsys):
    code = cli.main(["doctor"])
    text = capsys.readouterr().out
    assert code == 0, text


# the bounds themselves ---------------------------------------------------------------------------------------------


def dependencies() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {r.name: r for r in map(Requirement, project["dependencies"])}


def lowest_pins() -> dict[str, str]:
    text = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


#: Libraries whose lower bound is not in ``constraints-lowest.txt``, with the version that stands there in its place.
NOT_TESTED = {"torch": "2.13.0"}


def test_the_lowest_versions_are_the_lower_bounds():
    pins = lowest_pins()
    assert set(pins) == set(dependencies())
    for name, requirement in dependencies().items():
        (bound,) = [s.version for s in requirement.specifier if s.operator == ">="]
        if name in NOT_TESTED:
            assert pins[name] == NOT_TESTED[name] and requirement.specifier.contains(pins[name])
        else:
            assert Version(pins[name]) == Version(bound), f"{name}: constraints-lowest.txt has {pins[name]}"


def test_the_versions_that_are_installed_lie_within_the_bounds():
    for name, requirement in dependencies().items():
        assert requirement.specifier.contains(metadata.version(name), prereleases=True), name
