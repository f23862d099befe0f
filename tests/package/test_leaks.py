"""Wrapping, loading and fitting again and again: nothing is left behind, and the base is what it was, bit for bit."""

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.lora import train_mode

ROWS = tiny.question_rows(4)
#: MB that the process may grow by over a thousand cycles: fragmentation, not one adapter of 40 kB each.
MEGABYTES = 15


def wrap(w: Any) -> Any:
    """Adapt, draw once, and take everything off."""
    blora = sp.bayesian_lora(w.llm)
    blora(input_ids=torch.tensor([[3, 4]]))
    blora.unload()
    return blora.adapter


def load(w: Any) -> Any:
    """Read a posterior, predict, and take it off."""
    posterior = sp.Posterior.from_pretrained(w.llm, w.path, task=w.task)
    posterior.predict(ROWS, num_draws=2)
    posterior.blora().unload()
    return posterior.adapter


def fit(w: Any) -> Any:
    """Learn, predict, and take it off."""
    posterior = sp.fit(sp.bayesian_lora(w.llm), w.task, ROWS, num_steps=1, progress=False).posterior
    posterior.predict(ROWS, num_draws=2)
    posterior.blora().unload()
    return posterior.adapter


def fail(w: Any) -> Any:
    """Errors at every stage."""
    for call in (
        lambda: sp.bayesian_lora(w.llm, prior="nothing"),
        lambda: sp.Posterior.from_pretrained(w.llm, w.path, task=sp.Regression(w.task.tokenizer)),
    ):
        with pytest.raises(ValueError):
            call()
    blora = sp.bayesian_lora(w.llm)
    with pytest.raises(ValueError):
        sp.fit(blora, w.task, [{"question": "what ?"}], progress=False)
    blora.unload()
    return blora.adapter


CYCLES = {"wrap": wrap, "load": load, "fit": fit, "fail": fail}


class World:
    """A base model, and a posterior of it on disk."""

    def __init__(self, path: Any) -> None:
        self.llm, self.task, self.path = tiny.causal_lm(), sp.MultipleChoice(tiny.tokenizer()), path
        posterior = sp.fit(sp.bayesian_lora(self.llm), self.task, ROWS, num_steps=1, progress=False).posterior
        posterior.save_pretrained(path)
        posterior.blora().unload()

    def look(self) -> dict[str, Any]:
        """All that a cycle could leave on the model."""
        modules = dict(self.llm.named_modules())
        return {
            "bits": {n: hash(t.numpy().tobytes()) for n, t in self.llm.state_dict().items()},
            "modules": {n: id(m) for n, m in modules.items()},
            "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
            "hooks": {n: [len(m._forward_hooks), len(m._forward_pre_hooks)] for n, m in modules.items()},
            "grad": {n: (p.requires_grad, p.grad is None) for n, p in self.llm.named_parameters()},
            "in use": len(train_mode._IN_USE),
        }


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "p")


def objects() -> Counter[str]:
    """Objects that the collector knows, by class."""
    gc.collect()
    return Counter(type(o).__name__ for o in gc.get_objects())


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


DEFAULT = {"wrap": 30, "load": 30, "fit": 10, "fail": 10}
NUMBERS = [
    *(pytest.param(cycle, DEFAULT[name], id=f"{name}-{DEFAULT[name]}") for name, cycle in CYCLES.items()),
    *(pytest.param(cycle, 1000, id=f"{name}-1000", marks=pytest.mark.slow) for name, cycle in CYCLES.items()),
]


@pytest.mark.parametrize(("cycle", "cycles"), NUMBERS)
def test_cycles_leave_nothing_behind(world, cycle: Callable[[Any], Any], cycles):
    cycle(world)
    before = world.look()
    for _ in range(2):  # what is made once, in the first round, is a cache; a leak is in both
        count, megabytes = objects(), resident_megabytes()
        adapters: list[weakref.ref[Any]] = [weakref.ref(cycle(world)) for _ in range(cycles)]
        more = objects() - count
        growth = resident_megabytes() - megabytes
        assert [ref for ref in adapters if ref() is not None] == []
        del more["ReferenceType"]  # those above
        more = {name: n for name, n in more.items() if n >= cycles // 2}
        if not more:
            break
    assert not more
    assert world.look() == before
    if cycles >= 1000:
        sys.stdout.write(f"\n{cycles} cycles: {growth:.2f} MB more\n")  # shown by -s
        assert growth < MEGABYTES
