"""A call whose draws do not fit into memory is refused before it computes anything, with both numbers and a way out."""

import re

import psutil
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro._process import memory
from scalabl_pyro.guides import Guide, NormalGuide
from scalabl_pyro.lora.forward import AdaptedLLM
from scalabl_pyro.prediction import room

ROWS = tiny.question_rows(4)
HUGE = 10**12


@pytest.fixture(scope="module")
def posterior():
    blora = sp.bayesian_lora(tiny.causal_lm(num_hidden_layers=1), r=2)
    options = {"num_steps": 1, "progress": False}
    return sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **options).posterior


@pytest.fixture
def no_pass(monkeypatch):
    """A forward pass of the LLM fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the LLM ran")

    monkeypatch.setattr(AdaptedLLM, "__call__", refuse)


CALLS = {
    "sample": lambda p: p.sample(HUGE),
    "sample sobol": lambda p: p.sample(HUGE, design="sobol"),
    "predict": lambda p: p.predict(ROWS, num_draws=HUGE),
    "predict_linearized": lambda p: p.predict_linearized(ROWS, num_draws=HUGE),
    "prior_predictive": lambda p: p.prior_predictive(ROWS, num_draws=HUGE),
    "to_arviz": lambda p: p.to_arviz(num_draws=HUGE),
    "to_arviz with prior": lambda p: p.to_arviz(num_draws=HUGE, prior=True),
    "diagnose": lambda p: p.diagnose(ROWS, num_draws=HUGE),
    "loo": lambda p: p.loo(ROWS, num_draws=HUGE),
    "log_weights": lambda p: p.log_weights(ROWS, num_draws=HUGE),
    "summary": lambda p: p.summary(num_draws=HUGE),
    "compare": lambda p: sp.compare({"a": p, "b": p}, ROWS, num_draws=HUGE),
    "plot": lambda p: sp.plots.posterior_by_layer(p, num_draws=HUGE),
    "mcmc": lambda p: sp.mcmc(p, ROWS, num_samples=HUGE),
    "factors": lambda p: sp.baselines.FactorPosterior(p, sp.baselines.SpectralNoise(0.1)).sample(HUGE),
    "factors predict": lambda p: sp.baselines.FactorPosterior(p, sp.baselines.SpectralNoise(0.1)).predict(
        ROWS, num_draws=HUGE
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_large_asks_say_what_they_would_take_before_any_work(posterior, no_pass, name):
    with pytest.raises(ValueError, match=r"would take [\d,.]+ GiB .* are available\. Nothing was computed\.") as caught:
        CALLS[name](posterior)
    needed, available = (int(found.replace(",", "")) for found in re.findall(r"\(([\d,]+) bytes\)", str(caught.value)))
    assert needed > available > 2**20
    assert "Ask for fewer draws" in str(caught.value)
    assert ("keep_draws=False" in str(caught.value)) == (name in ("predict", "predict_linearized", "prior_predictive"))


def test_the_message_has_the_bytes_as_computed_and_as_read(posterior, monkeypatch):
    dim, rows, classes = posterior.subspace.dim, len(ROWS), 4
    needed = 2000 * (room.COPIES * dim * 4 + room.COPIES_OF_PREDICTIONS * rows * classes * 4)
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=rf"\({needed:,} bytes\).*\({needed - 1:,} bytes\) are available"):
        posterior.predict(ROWS, num_draws=2000)
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    sites = posterior.guide.sample(1, seed=0)
    assert room.size_of(sites) == dim * 4
    room.check_room(posterior.guide, 2000, per_draw=room.COPIES_OF_PREDICTIONS * rows * classes * 4)


def test_many_rows_are_refused_with_few_draws_too(posterior, monkeypatch, no_pass):
    monkeypatch.setattr(memory, "available_memory", lambda: 2000)
    with pytest.raises(ValueError, match="10 draws and their predictions of 4 rows would take"):
        posterior.predict(ROWS, num_draws=10)


def test_averages_need_no_more_memory_for_more_draws(posterior, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    assert posterior.predict(ROWS, num_draws=2, keep_draws=False).num_draws == 2
    with pytest.raises(ValueError, match=r"predict\(..., keep_draws=False\), which keeps averages"):
        posterior.predict(ROWS, num_draws=2)


def test_a_family_that_makes_all_draws_at_once_is_checked(monkeypatch):
    class AtOnce(NormalGuide):
        def sample_and_log_prob(self, num_draws, *, seed):
            return Guide.sample_and_log_prob(self, num_draws, seed=seed)

    guide = AtOnce(torch.zeros(3), torch.ones(3))
    monkeypatch.setattr(memory, "available_memory", lambda: 100)
    assert len(list(guide.sample_in_parts(8, size=3, seed=0))) == 3  # 96 bytes
    with pytest.raises(ValueError, match=r"9 draws of AtOnce, which makes them all at once, .*define AtOnce.sample_in"):
        next(guide.sample_in_parts(9, size=3, seed=0))


def test_available_memory_is_that_of_the_system_or_of_the_container(tmp_path, monkeypatch):
    system = psutil.virtual_memory().available
    monkeypatch.setattr(memory, "GROUPS", ((tmp_path, "memory.max", "memory.current"),))
    assert memory.available_memory() == pytest.approx(system, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    assert memory.available_memory() == pytest.approx(system, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_memory() == 450
    (tmp_path / "memory.max").write_text("100\n")
    assert memory.available_memory() == 0
