"""A child that is forked while another thread is in the middle of something works, and finds everything as it was."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import pytest
import tiny
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from tqdm.std import TqdmDefaultWriteLock

import scalabl_pyro as sp
from scalabl_pyro._process.lock import IDLE, LOCK
from scalabl_pyro._process.pyro_modes import local_params
from scalabl_pyro._process.random_state import scoped_seed
from scalabl_pyro.lora import uses
from scalabl_pyro.lora.train_mode import eval_mode, sole_use

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

ROWS = tiny.question_rows(6)
SECONDS = 60


@contextmanager
def another_thread_inside(*contexts: Any):
    """Let another thread enter these contexts, and stay there for as long as this context is open."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            inside.set()
            leave.wait(SECONDS)

    thread = threading.Thread(target=stay, daemon=True)
    thread.start()
    assert inside.wait(SECONDS)
    try:
        yield
    finally:
        leave.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


def in_child(function: Callable[[], bool]) -> str:
    """Fork, call a function in the child, and say how it ended: ``"True"``, ``"False"``, ``"hangs"`` or its error."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "nothing"
        try:
            answer = str(function())
        except BaseException as error:
            answer = repr(error)
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + SECONDS / 4
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)
            return "hangs"
        time.sleep(0.01)
    answer = os.read(reading, 10_000).decode()
    os.close(reading)
    return answer


def as_before(expected: np.ndarray, posterior: sp.Posterior) -> Callable[[], bool]:
    return lambda: bool(np.array_equal(posterior.predict(ROWS, num_draws=2).log_probs, expected))


@pytest.fixture(scope="module")
def posterior():
    task, blora = sp.MultipleChoice(tiny.tokenizer()), sp.bayesian_lora(tiny.causal_lm())
    return sp.fit(blora, task, ROWS, num_steps=2, progress=False).posterior


def waiting_at_the_gate():
    """Two threads that compete: one holds the lock, the other one the gate in front of it."""

    @contextmanager
    def both():
        with LOCK:
            waiter = threading.Thread(target=lambda: (LOCK.acquire(), LOCK.release()), daemon=True)
            waiter.start()
            while not LOCK._gate._is_owned() and LOCK._gate.acquire(blocking=False):
                LOCK._gate.release()
                time.sleep(0.01)
            yield

    return both


HELD = {
    "the lock": lambda llm: [lambda: LOCK],
    "the gate too": lambda llm: [waiting_at_the_gate()],
    "the condition": lambda llm: [lambda: IDLE],
    "the lock of progress bars": lambda llm: [lambda: TqdmDefaultWriteLock.th_lock],
    "the lock of uses": lambda llm: [lambda: uses._LOCK],
    "a seed": lambda llm: [lambda: scoped_seed(5)],
    "Pyro": lambda llm: [local_params],
    "a training of the module": lambda llm: [lambda: sole_use(llm)],
    "a prediction with the module": lambda llm: [lambda: eval_mode(llm)],
}


@pytest.mark.parametrize("held", HELD)
def test_a_child_predicts_and_trains_while_a_thread_of_the_parent_holds(posterior, held):
    llm = posterior.adapter.module.train()
    expected = posterior.predict(ROWS, num_draws=2).log_probs
    state = torch.get_rng_state()

    def work() -> bool:
        alike = as_before(expected, posterior)()
        kept = bool(torch.equal(torch.get_rng_state(), state)) and llm.training
        sp.fit(posterior.blora(), posterior.task, ROWS, num_steps=1, progress=False)
        return alike and kept and not pyro.settings.get("module_local_params") and not LOCK.is_held()

    if tqdm.monitor is not None:  # a thread of tqdm that an earlier bar has started takes a lock of all processes
        tqdm.monitor.exit()
    with another_thread_inside(*HELD[held](llm)):
        assert in_child(work) == "True"
    np.testing.assert_array_equal(posterior.predict(ROWS, num_draws=2).log_probs, expected)


def test_a_child_has_not_the_handlers_of_another_thread(posterior):
    @contextmanager
    def handler():
        with local_params(), pyro.poutine.block():
            yield

    with another_thread_inside(handler):
        assert len(_PYRO_STACK) == 1
        assert in_child(lambda: not _PYRO_STACK) == "True"


def test_a_child_may_unload_what_another_thread_of_the_parent_uses():
    blora = sp.bayesian_lora(tiny.causal_lm())
    with another_thread_inside(lambda: blora.adapter.bind(torch.zeros(blora.subspace.dim))):
        assert in_child(lambda: blora.unload() is not None) == "True"
        with pytest.raises(RuntimeError, match="another thread uses it"):
            blora.unload()


def test_a_child_of_the_thread_that_holds_the_lock_still_holds_it():
    """It leaves the context as its parent does, once."""

    def work() -> bool:
        held = LOCK.is_held()
        LOCK.release()
        return held and not LOCK.is_held()

    with LOCK:
        assert in_child(work) == "True"


def test_a_child_of_a_training_thread_may_predict(posterior):
    expected = posterior.predict(ROWS, num_draws=2).log_probs
    with sole_use(posterior.adapter.module), scoped_seed(3), local_params():
        assert in_child(as_before(expected, posterior)) == "True"


class Encoded(Dataset):
    """Rows that a worker tokenizes and predicts."""

    def __init__(self, posterior: sp.Posterior) -> None:
        self.posterior = posterior

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self.posterior.predict(ROWS, num_draws=2, seed=index).log_probs)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_workers_of_a_loader_start_while_a_thread_holds_the_lock(posterior):
    expected = [posterior.predict(ROWS, num_draws=2, seed=seed).log_probs for seed in range(2)]
    loader = DataLoader(Encoded(posterior), batch_size=None, num_workers=2, timeout=20, multiprocessing_context="fork")
    with another_thread_inside(lambda: LOCK):
        found = list(loader)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
