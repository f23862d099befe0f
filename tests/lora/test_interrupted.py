"""An exception at any line of wrapping or loading leaves the module as it was."""

import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import families
import peft
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_cases import Case
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro._process.lock import LOCK
from scalabl_pyro.lora import module_snapshot
from scalabl_pyro.lora.attach import find_adapter

PACKAGE = str(Path(sp.__file__).parent)
PEFT = str(Path(peft.__file__).parent)


class Injected(BaseException):
    """No subclass of Exception, as KeyboardInterrupt is none."""


def state(module):
    """All that wrapping touches: modules, attributes, hooks, parameters with their flags and values, config."""
    parts = {
        name: (
            id(m),
            sorted(m.__dict__),
            m.training,
            [(n, id(v)) for n, v in m._modules.items()],
            [(n, id(v), v.requires_grad) for n, v in m._parameters.items() if v is not None],
            [list(hooks) for key, hooks in sorted(m.__dict__.items()) if key.endswith("_hooks")],
            m.__dict__.get("forward"),
            {
                key: dict(m.__dict__[key])
                for key in ("scaling", "r", "lora_variant")
                if isinstance(m.__dict__.get(key), dict)
            },
        )
        for name, m in module.named_modules()
    }
    config = module.config.to_dict() if hasattr(module, "config") else None
    return parts, config, {n: p.detach().clone() for n, p in module.named_parameters()}


def assert_same(module, before):
    *structure, weights = state(module)
    *structure_before, weights_before = before
    assert structure == structure_before
    assert all(torch.equal(value, weights_before[name]) for name, value in weights.items())


class InjectAt:
    """Count the line events of the chosen files, and raise at one of them.

    Args:
        number: Index of the event at which to raise; None only records.
        folders: Folders whose files count.
    """

    def __init__(self, number=None, folders=(PACKAGE,)):
        self.number = number
        self.folders = folders
        self.events = []

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.folders):
            return None
        return self.line

    def line(self, frame, event, arg):
        if event == "line":
            self.events.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.events) - 1 == self.number:
                raise Injected
        return self.line

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)


def chosen_events(events, *, stride):
    """Indices of the first event of every ``stride``-th line, or of all events if ``stride`` is 0."""
    first = {line: index for index, line in reversed(list(enumerate(events)))}
    return sorted(first.values())[::stride] if stride else range(len(events))


def inject_everywhere(module, wrap, *, stride, folders=(PACKAGE,), after=lambda m: find_adapter(m).unload()):
    """Raise at events of ``wrap(module)``, one after the other, and compare the module each time.

    Returns:
        How often the exception was raised, and how often another code swallowed it.
    """
    with InjectAt(folders=folders) as recorder:
        wrap(module)
    after(module)
    before, outcomes, random_state = state(module), Counter(), torch.get_rng_state()
    for number in chosen_events(recorder.events, stride=stride):
        try:
            with InjectAt(number, folders):
                wrap(module)
        except Injected:
            outcomes["raised"] += 1
        else:
            outcomes["passed"] += 1
            after(module)
        assert_same(module, before)
        assert not LOCK.is_held()
        assert torch.equal(torch.get_rng_state(), random_state)
    return outcomes


def plain_net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 3))).train()


def classifier():
    return tiny.classifier("llama").requires_grad_(False).train()


def causal_lm():
    llm = tiny.causal_lm()
    llm.lm_head.weight.requires_grad_(False)
    return llm


def peft_model():
    return get_peft_model(plain_net(), LoraConfig(r=2, target_modules=["0"]))


WRAPS = {
    "plain": (plain_net, lambda m: sp.bayesian_lora(m, r=4, cut_rank=True)),
    "peft": (peft_model, sp.bayesian_lora),
    "classifier": (classifier, lambda m: sp.bayesian_lora(m, r=2, layers_to_transform=1)),
    "causal": (causal_lm, lambda m: sp.bayesian_lora(m, r=2, layers_to_transform=1, exclude_modules=["lm_head"])),
}
STRIDES = {"plain": 4, "peft": 4, "classifier": 24, "causal": 24}


@pytest.mark.parametrize("case", WRAPS)
def test_an_exception_at_any_line_of_wrapping_leaves_the_module_as_it_was(case):
    make, wrap = WRAPS[case]
    outcomes = inject_everywhere(make(), wrap, stride=STRIDES[case])
    assert outcomes["raised"] > 10
    assert not outcomes["passed"]


def is_free(lock):
    taken = lock.acquire(timeout=0.5)
    if taken:
        lock.release()
    return taken


def test_an_exception_at_any_line_of_the_lock_leaves_it_to_other_threads():
    net, file = plain_net(), (str(Path(PACKAGE) / "_process" / "lock.py"),)
    with InjectAt(folders=file) as recorder:
        sp.bayesian_lora(net, r=2).unload()
    assert len(recorder.events) > 5
    for number in range(len(recorder.events)):
        with pytest.raises(Injected), InjectAt(number, file):
            sp.bayesian_lora(net, r=2)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(is_free, LOCK._gate).result(), recorder.events[number]
        assert not LOCK.is_held()


@pytest.mark.slow
@pytest.mark.parametrize("case", WRAPS)
def test_an_exception_at_any_line_of_peft_leaves_the_module_as_it_was(case):
    make, wrap = WRAPS[case]
    outcomes = inject_everywhere(make(), wrap, stride=1, folders=(PACKAGE, PEFT))
    assert outcomes["raised"] > 300


def load_at(path):
    return lambda llm: sp.Posterior.from_pretrained(llm, path)


@pytest.mark.parametrize("stride", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_at_any_line_of_loading_leaves_the_module_as_it_was(stride, fitted, tmp_path):
    fitted.posterior.save_pretrained(tmp_path / "p")
    outcomes = inject_everywhere(tiny.causal_lm().train(), load_at(tmp_path / "p"), stride=stride)
    assert outcomes["raised"] > 10


def bring(path):
    return lambda llm: sp.from_peft(llm, path)


@pytest.mark.parametrize("stride", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_at_any_line_of_from_peft_leaves_the_base_as_it_was(stride, tmp_path):
    """The adapter trained biases of the base, which PEFT overwrites in place."""
    Case({"target_modules": ["q_proj"], "bias": "all"}, base=biased).model().save_pretrained(tmp_path / "a")
    llm = biased().train()
    values = {name: p.detach().clone() for name, p in llm.named_parameters()}
    flags = {name: p.requires_grad for name, p in llm.named_parameters()}

    def after(module):
        find_adapter(module).unload().unload()
        for name, p in module.named_parameters():
            p.data.copy_(values[name])
            p.requires_grad_(flags[name])
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(module).pop(name, None)

    outcomes = inject_everywhere(llm, bring(tmp_path / "a"), stride=stride, after=after)
    assert outcomes["raised"] > 10


def biased():
    return tiny.causal_lm("llama", attention_bias=True)


@pytest.mark.parametrize("stride", [60, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_at_any_line_of_an_export_leaves_no_files_and_the_module_as_it_was(stride, fitted, tmp_path):
    posterior, path = fitted.posterior, tmp_path / "out"

    def export():
        posterior.export_peft(path, draws=2)

    with InjectAt() as recorder:
        export()
    shutil.rmtree(path)
    module, raised = posterior.adapter.module, 0
    before = state(module)
    for number in chosen_events(recorder.events, stride=stride):
        try:
            with InjectAt(number):
                export()
        except Injected:
            raised += 1
        assert_same(module, before)
        if path.exists():  # the exception came behind the last file, and the export is whole
            assert sorted(part.name for part in path.iterdir()) == ["draw-0", "draw-1", "index.json"]
            shutil.rmtree(path)
        assert not [part for part in tmp_path.iterdir() if not part.name.startswith(".")]
    assert raised > 10


def test_ctrl_c_while_the_module_is_put_back_waits(monkeypatch):
    """A second Ctrl-C must not leave the module half restored."""
    net = plain_net()
    before = state(net)
    monkeypatch.setattr(module_snapshot, "_refill", press_ctrl_c_once(module_snapshot._refill))
    with pytest.raises(KeyboardInterrupt):
        sp.bayesian_lora(net, r=2, prior="norml")
    assert_same(net, before)


def press_ctrl_c_once(function):
    presses = [signal.SIGINT]

    def wrapped(*args):
        if presses:
            signal.raise_signal(presses.pop())
        return function(*args)

    return wrapped


HALF_WRAPPED = {
    "Mamba": (lambda: families.causal_lm("mamba"), {"target_modules": ["in_proj", "out_proj"]}, "out_proj"),
    "a prior": (lambda: families.causal_lm("deepseek_v3"), {"prior": "norml"}, "norml"),
    "a seed": (lambda: families.causal_lm("glm4_moe"), {"seed": 1.5}, "seed"),
}


@pytest.mark.parametrize("case", HALF_WRAPPED)
def test_an_error_in_the_middle_of_wrapping_leaves_nothing_behind(case):
    make, options, message = HALF_WRAPPED[case]
    llm = make()
    before = state(llm)
    with pytest.raises((ValueError, TypeError), match=message):
        sp.bayesian_lora(llm, r=2, **options)
    assert_same(llm, before)
    assert not any(isinstance(m, BaseTunerLayer) for m in llm.modules())
