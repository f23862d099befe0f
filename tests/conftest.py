"""Guards: a test that leaves global state changed fails, whatever it meant to test."""

import random
import socket
import warnings
from pathlib import Path

import gaussians
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
import toys
from pyro import infer, poutine

import scalabl_pyro as sp

torch.set_num_threads(1)  # tiny models: threads only get into each other's way, the more so under xdist

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _global_state() -> dict[str, object]:
    return {
        "param store": sorted(pyro.get_param_store().keys()),
        "pyro settings": {k: v for k, v in pyro.settings.get().items()},
        "distribution validation": dist.is_validation_enabled(),
        "inference validation": infer.is_validation_enabled(),
        "poutine validation": poutine.is_validation_enabled(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "pyro handler stack": len(poutine.runtime._PYRO_STACK),
    }


@pytest.fixture(autouse=True)
def unchanged_globals():
    """Pyro's store, settings and handlers, torch's dtype and grad mode are as before after each test.

    Each test starts from the same random state: which tests ran before it in its process changes nothing.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test draw from this one)
    before = _global_state()
    yield
    after = _global_state()
    pyro.clear_param_store()
    assert after == before, "the test left global state changed"


@pytest.fixture
def unchanged_rng():
    """The global random states are as before after the test."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random state moved"


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach a network fails the test, also one that the code under test would catch."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("the test must not reach a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    yield
    assert not tried, tried


@pytest.fixture
def stock_pyro():
    """For tests of stock SVI, which keeps its parameters in the global store."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def llm():
    return tiny.causal_lm()


@pytest.fixture
def blora(llm):
    return sp.bayesian_lora(llm)


@pytest.fixture
def task(tokenizer):
    return sp.MultipleChoice(tokenizer)


@pytest.fixture(scope="session")
def fitted():
    """A posterior of the tiny Llama that has learned the questions."""
    with warnings.catch_warnings():
        task = sp.MultipleChoice(tiny.tokenizer())
        blora = sp.bayesian_lora(tiny.causal_lm())
        return sp.fit(blora, task, tiny.question_rows(48), num_steps=60, lr=1e-2, init_scale=0.05, progress=False)


@pytest.fixture(scope="module")
def toy():
    """A linear model whose latents are correlated."""
    return toys.LinearToy(3, correlation=0.3)


@pytest.fixture(scope="module")
def exact(toy):
    """Its posterior, evidence and leave-one-out densities."""
    return gaussians.solve(toy.features, toy.y)


@pytest.fixture(scope="session")
def shared_data():
    """Real data sets beside the checkout; users do not have them."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA
