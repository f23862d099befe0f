"""``scalabl_pyro.infer.SVI``: each step equals that of stock SVI in float64, for many models, guides and ELBOs."""

import logging
import math
import random
import subprocess
import sys
from collections import UserDict
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer import SVI as StockSVI
from pyro.infer import (
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

import scalabl_pyro as sp
from scalabl_pyro.data import Batch
from scalabl_pyro.infer import SVI
from scalabl_pyro.inference import svi as module
from scalabl_pyro.inference.call_arguments import CallArguments
from scalabl_pyro.inference.host_draws import no_host_draws

pytestmark = pytest.mark.usefixtures("stock_pyro")

N, ROWS = 40, 6
IDS = torch.arange(2, 2 + 7 * ROWS).view(ROWS, 7) % 50 + 2
LABELS = torch.arange(ROWS) % 4
X = torch.linspace(-1, 2, 24, dtype=torch.float64).view(8, 3)
Y = X.sum(-1).sin()


def llm_program(**options):
    """The model of the README and its trained factors."""
    blora = sp.bayesian_lora(tiny.causal_lm().double(), r=2, target_modules=["q_proj", "v_proj"], **options)

    def model(ids, mask, labels=None):
        outputs = blora(input_ids=ids, attention_mask=mask, positions=mask.sum(1) - 1)
        logits = outputs.logits[..., 0, 21:25]
        with pyro.plate("data", N, subsample_size=len(ids)):
            pyro.sample("label", dist.Categorical(logits=logits), obs=labels)

    return blora, model


def on_llm(family, **options):
    def build():
        blora, model = llm_program()
        auto = getattr(autoguide, family)(model, init_loc_fn=blora.init_loc, init_scale=0.05, **options)
        return model, auto, (IDS, torch.ones_like(IDS)), {"labels": LABELS}

    return build


def own_guide_of_the_package():
    blora, model = llm_program()
    own = sp.guides.as_guide("normal", blora).double()

    def guide(*args, **kwargs):
        return own()

    return model, guide, (IDS, torch.ones_like(IDS)), {"labels": LABELS}


def learned_prior():
    blora, model = llm_program(prior="empirical")
    blora.prior.double()
    auto = autoguide.AutoNormal(model, init_loc_fn=blora.init_loc, init_scale=0.05)
    return model, auto, (IDS, torch.ones_like(IDS)), {"labels": LABELS}


class Regression(PyroModule):
    """A PyroModule with a latent, a plain parameter and a constrained one."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        self.offset = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.noise = PyroParam(torch.tensor(0.7, dtype=torch.float64), constraint=constraints.positive)

    def forward(self, x, y=None):
        mean = x @ self.weight + self.offset
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def pyro_module():
    model = Regression()
    return model, autoguide.AutoMultivariateNormal(model, init_scale=0.1), (X,), {"y": Y}


def subsampled():
    """A plate that draws its rows itself, and a hand-written guide with constrained parameters."""

    def model():
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        spread = pyro.param("spread", torch.tensor(0.5, dtype=torch.float64), constraint=constraints.interval(0.1, 2))
        with pyro.plate("data", len(Y), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(mean, spread), obs=Y[rows])

    def guide():
        loc = pyro.param("loc", torch.tensor(0.2, dtype=torch.float64))
        scale = pyro.param("scale", torch.tensor(0.4, dtype=torch.float64), constraint=constraints.positive)
        pyro.sample("mean", dist.Normal(loc, scale))

    return model, guide, (), {}


def late_parameters():
    """Parameters that appear at the third step, and one that every other step leaves out."""
    count = {"steps": 0}

    def model():
        count["steps"] += 1
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        if count["steps"] > 2:
            mean = mean + pyro.param("late", torch.tensor(0.1, dtype=torch.float64))
        if count["steps"] % 2:
            mean = mean * pyro.param("sometimes", torch.tensor(1.1, dtype=torch.float64))
        unused = pyro.param("unused", torch.tensor(1.0, dtype=torch.float64))
        if count["steps"] == 4:
            mean = mean + unused
        with pyro.plate("data", len(Y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)

    def guide():
        loc = pyro.param("loc", torch.tensor(0.2, dtype=torch.float64))
        pyro.sample("mean", dist.Normal(loc, 0.3))

    return model, guide, (), {}


def discrete():
    """A guide whose draws carry no gradient."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
        with pyro.plate("data", len(Y)):
            pyro.sample("y", dist.Normal(z * pyro.param("slope", torch.tensor(1.0, dtype=torch.float64)), 1.0), obs=Y)

    def guide():
        odds = pyro.param("odds", torch.tensor(0.4, dtype=torch.float64), constraint=constraints.unit_interval)
        pyro.sample("z", dist.Bernoulli(odds))

    return model, guide, (), {}


def adam():
    return pyro.optim.Adam({"lr": 1e-2})


def by_name():
    def options(name):
        return {"lr": 3e-2 if "scale" in name else 1e-2, "betas": (0.8, 0.99)}

    return pyro.optim.ClippedAdam(options)


OPTIMIZERS = {
    "Adam": adam,
    "Adam by name": lambda: pyro.optim.Adam(lambda name: {"lr": 3e-2 if "scale" in name else 1e-2}),
    "Adam, clipped": lambda: pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.5, "clip_value": 0.2}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 1e-3}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9, "clip_norm": 0.1, "weight_decay": 0.1}),
    "ClippedAdam, centered": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "centered_variance": True}),
    "ClippedAdam by name": by_name,
    "a schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
    ),
    "Pyro's own": lambda: pyro.optim.AdagradRMSProp({"eta": 1e-2}),
}
ELBOS = {
    "one draw": Trace_ELBO,
    "5 draws": lambda: Trace_ELBO(num_particles=5),
    "3 draws at once": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
}
CASES = [
    *((on_llm("AutoNormal"), name, "one draw") for name in OPTIMIZERS),
    *((on_llm("AutoNormal"), "Adam", elbo) for elbo in ELBOS),
    *((subsampled, "ClippedAdam", elbo) for elbo in ELBOS if elbo != "3 draws at once"),
    (on_llm("AutoDiagonalNormal"), "Adam", "5 draws"),
    (on_llm("AutoMultivariateNormal"), "ClippedAdam", "one draw"),
    (on_llm("AutoLowRankMultivariateNormal", rank=2), "AdamW", "one draw"),
    (own_guide_of_the_package, "Adam", "mean field"),
    (own_guide_of_the_package, "ClippedAdam", "one draw"),
    (learned_prior, "Adam", "one draw"),
    (pyro_module, "Adam", "5 draws"),
    (pyro_module, "ClippedAdam", "one draw"),
    (late_parameters, "Adam", "one draw"),
    (late_parameters, "ClippedAdam by name", "one draw"),
    (late_parameters, "SGD", "one draw"),
    (discrete, "Adam", "graph"),
    (discrete, "Adam", "one draw"),
]


def trained(kind, build, optimizer, elbo, *, steps=5):
    """Losses of steps, and the unconstrained parameters afterwards, by names without the number of the adapter."""
    pyro.clear_param_store()
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        model, guide, args, kwargs = build()
        svi = kind(model, guide, OPTIMIZERS[optimizer](), ELBOS[elbo]())
        losses = []
        for _ in range(steps):
            losses.append(svi.step(*args, **kwargs))
            if optimizer == "a schedule":
                svi.optim.step()
        losses.append(svi.evaluate_loss(*args, **kwargs))
    return losses, parameters(), svi


def parameters():
    stored = pyro.get_param_store().named_parameters()
    return {name.split("$$$")[-1]: value.detach().clone() for name, value in stored}


def assert_equal_runs(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-10, abs=1e-10)
    assert list(found[1]) == list(expected[1]) and expected[1]
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("build", "optimizer", "elbo"), CASES)
def test_each_step_equals_that_of_stock_svi(build, optimizer, elbo):
    expected = trained(StockSVI, build, optimizer, elbo)
    found = trained(SVI, build, optimizer, elbo)
    assert_equal_runs(found, expected)
    assert all(isinstance(loss, float) for loss in found[0])


class FakeReplay:
    """Takes the calls of ``BatchReplay`` and runs Python each time, in the mode of a capture from the second on."""

    made = 0

    def __init__(self, function, *, recorder, clear_gradients):
        FakeReplay.made += 1
        self.recorder = recorder
        self.function = function
        self.clear_gradients = clear_gradients
        self.seen, self.captured, self.is_capturing = set(), {}, False

    def __call__(self, given, weight):
        key = given.shapes()
        if key not in self.seen:
            self.seen.add(key)
            return self.function(given, weight)
        if key not in self.captured:
            self.captured[key] = given.map(torch.clone)
            self.clear_gradients()
        self.captured[key].copy_(given)
        self.is_capturing = True
        try:
            return self.function(self.captured[key], weight)
        finally:
            self.is_capturing = False


@pytest.fixture
def captures(monkeypatch):
    """Steps take the way of a capture, on the CPU."""
    made = []

    def make(*args, **kwargs):
        made.append(FakeReplay(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(module, "BatchReplay", make)
    monkeypatch.setattr(module, "Recorder", lambda device: SimpleNamespace(on_stream=nullcontext))
    monkeypatch.setattr(module, "why_not", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "is_capturing", lambda: bool(made) and made[-1].is_capturing)
    monkeypatch.setattr(module, "no_host_draws", nullcontext)  # the CPU is the device here
    return made


REPLAYED = [
    (on_llm("AutoNormal"), "Adam", "one draw"),
    (on_llm("AutoNormal"), "ClippedAdam by name", "5 draws"),
    (on_llm("AutoNormal"), "SGD", "3 draws at once"),
    (own_guide_of_the_package, "Adam, clipped", "mean field"),
    (pyro_module, "AdamW", "5 draws"),
]


@pytest.mark.parametrize(("build", "optimizer", "elbo"), REPLAYED)
def test_a_captured_step_computes_what_stock_svi_computes(captures, build, optimizer, elbo):
    expected = trained(StockSVI, build, optimizer, elbo)
    found = trained(SVI, build, optimizer, elbo)
    assert_equal_runs(found, expected)
    assert found[2].num_captured == 1 and len(captures) == 1


def test_each_shape_and_each_plain_argument_has_its_own_graph(captures):
    model, guide, _, _ = pyro_module()
    svi = SVI(lambda x, y, power: model(x**power, y), lambda x, y, power: guide(x, y), adam(), Trace_ELBO())
    for x, power in ((X, 1), (X[:5], 1), (X, 1.0)):
        for _ in range(4):
            svi.step(x, Y[: len(x)], power)
    assert svi.num_captured == 3


def test_a_cleared_store_is_seen(captures):
    """A replay would go on with parameters that nobody reads."""
    model, guide, _, _ = subsampled()
    svi = SVI(model, guide, adam(), Trace_ELBO())
    for _ in range(4):
        svi.step()
    pyro.clear_param_store()
    for _ in range(4):
        svi.step()
    assert parameters()["loc"] != 0.2 and len(captures) == 2
    assert len(svi.optim.get_state()) == 3 and None not in svi.optim.get_state()


def test_another_rate_reaches_the_next_step(captures):
    model, guide, args, kwargs = pyro_module()
    svi = SVI(model, guide, adam(), Trace_ELBO())
    for _ in range(4):
        svi.step(*args, **kwargs)
    before = parameters()
    for group in svi._joint.optimizer.param_groups:
        group["lr"] = 0.0
    svi.step(*args, **kwargs)
    assert all(torch.equal(value, before[name]) for name, value in parameters().items())


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: torch.rand(()), "torch's CPU generator"),
        (lambda: np.random.rand(), "numpy"),  # noqa: NPY002
        (lambda: random.random(), "random"),
    ],
)
def test_draws_on_the_host_are_found_and_undone(draw, name):
    with pytest.raises(RuntimeError, match=f"from {name};"), no_host_draws():
        first = draw()
    assert draw() == first


def test_the_random_rows_of_a_plate_are_no_draw_of_the_model():
    with torch.random.fork_rng(), no_host_draws(), pyro.plate("data", 10, subsample_size=4) as rows:
        assert len(rows) == 4
    with torch.random.fork_rng(), pytest.raises(RuntimeError, match="replay would repeat"):
        with no_host_draws(), pyro.plate("data", 10, subsample_size=4):
            pyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("build", [late_parameters, discrete])
def test_what_a_graph_cannot_hold_ends_its_capture(captures, build):
    model, guide, _, _ = build()
    svi = SVI(model, guide, adam(), Trace_ELBO())
    with pytest.raises(RuntimeError, match=r"new in the step|without a gradient"):
        for _ in range(6):
            svi.step()


def test_arguments_a_graph_cannot_stand_for_are_named(captures, caplog):
    model, guide, _, _ = pyro_module()
    svi = SVI(lambda x, y, extra: model(x, y), lambda x, y, extra: guide(x, y), adam(), Trace_ELBO())
    with caplog.at_level(logging.INFO, "scalabl_pyro"):
        for _ in range(4):
            svi.step(X, Y, extra={"rows": np.ones(2)})
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "steps run without CUDA graphs: extra.rows is of type ndarray: a replay would not see what changes in it"
    ]
    assert svi.num_captured == 0
    given = CallArguments((X,), {"y": Y.clone().requires_grad_()})
    assert "requires a gradient" in given.why_not(X.device)
    assert "argument 0 is on cpu" in CallArguments((X,), {}).why_not(torch.device("meta"))


def test_arguments_are_mapped_and_copied_in_every_container():
    batch = Batch({"input_ids": IDS}, LABELS, torch.arange(ROWS), torch.full((ROWS,), 6))
    given = CallArguments(([X, (Y, None)], UserDict(a=X)), {"batch": batch, "names": {"b": Y}}, context=(3,))
    static = given.map(torch.clone)
    assert static.shapes() == given.shapes() and static.shapes()[-1] == 3
    assert {"input_ids", "a", "b"} <= set(given.inputs)
    static.copy_(given.map(lambda t: t + 1))
    assert torch.equal(static.args[0][1][0], Y + 1) and torch.equal(static.kwargs["batch"].target, LABELS + 1)
    assert isinstance(static.args[1], UserDict) and torch.equal(static.args[1]["a"], X + 1)
    other = CallArguments(([X, (Y, 1)], UserDict(a=X)), {"batch": batch, "names": {"b": Y}}, context=(3,))
    assert other.shapes() != given.shapes()


@pytest.mark.parametrize(("kind", "keeps"), [(StockSVI, True), (SVI, False)])
def test_an_autoguide_keeps_no_graph_of_gradients(kind, keeps):
    """It would hold the activations of a pass, and tie the parameters' gradients to a stream that no capture allows."""
    blora, labelled = llm_program()

    def model(ids, mask):
        labelled(ids, mask, LABELS)
        return blora(input_ids=ids, s=blora.adapter.loc.double()).logits

    guide = autoguide.AutoNormal(model, init_scale=0.05)
    own = guide.model
    kind(model, guide, adam(), Trace_ELBO()).step(IDS, torch.ones_like(IDS))
    assert guide.model is own
    assert guide.prototype_trace.nodes["_RETURN"]["value"].requires_grad == keeps


def test_other_elbos_train_eagerly():
    model, guide, _, _ = discrete()
    svi = SVI(model, guide, adam(), TraceEnum_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step())
    assert all(map(math.isfinite, SVI(model, guide, adam(), ReweightedWakeSleep(num_particles=3)).step()))


@pytest.mark.parametrize("optimizer", ["Adam", "ClippedAdam", "SGD"])
@pytest.mark.parametrize(("first", "second"), [(SVI, SVI), (StockSVI, SVI), (SVI, StockSVI)])
def test_a_saved_state_goes_on_here_and_with_stock_svi(tmp_path, optimizer, first, second):
    build, elbo = pyro_module, Trace_ELBO
    whole = trained(StockSVI, build, optimizer, "one draw", steps=6)

    pyro.clear_param_store()
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        model, guide, args, kwargs = build()
        svi = first(model, guide, OPTIMIZERS[optimizer](), elbo())
        losses = [svi.step(*args, **kwargs) for _ in range(3)]
        svi.optim.save(str(tmp_path / "optimizer"))
        again = OPTIMIZERS[optimizer]()
        again.load(str(tmp_path / "optimizer"))
        svi = second(model, guide, again, elbo())
        losses += [svi.step(*args, **kwargs) for _ in range(3)]
        losses.append(svi.evaluate_loss(*args, **kwargs))
    assert_equal_runs((losses, parameters()), whole)


def test_an_optimizer_of_stock_svi_keeps_its_state_here():
    whole = trained(StockSVI, pyro_module, "Adam", "one draw", steps=4)
    pyro.clear_param_store()
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        model, guide, args, kwargs = pyro_module()
        optim = adam()
        losses = [StockSVI(model, guide, optim, Trace_ELBO()).step(*args, **kwargs) for _ in range(2)]
        svi = SVI(model, guide, optim, Trace_ELBO())
        losses += [svi.step(*args, **kwargs) for _ in range(2)]
        losses.append(svi.evaluate_loss(*args, **kwargs))
        with pytest.raises(RuntimeError, match=r"new\.set_state"):
            StockSVI(model, guide, optim, Trace_ELBO()).step(*args, **kwargs)
    assert_equal_runs((losses, parameters()), whole)


def test_all_parameters_share_one_optimizer_with_a_group_per_rate():
    svi = trained(SVI, on_llm("AutoNormal"), "Adam by name", "one draw", steps=1)[2]
    groups = svi._joint.optimizer.param_groups
    assert {group["lr"] for group in groups} == {1e-2, 3e-2} and len(groups) == 2
    assert sum(len(group["params"]) for group in groups) == len(parameters())


def test_a_class_of_torch_and_its_options_will_do():
    model, guide, args, kwargs = pyro_module()
    svi = SVI(model, guide, (torch.optim.AdamW, {"lr": 1e-2}), Trace_ELBO())
    svi.step(*args, **kwargs)
    assert type(svi._joint.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"loss": lambda model, guide: 0.0}, TypeError, r"expected an ELBO such as pyro\.infer\.Trace_ELBO\(\)"),
        ({"loss": Trace_ELBO}, TypeError, "expected an ELBO"),
        ({"optim": torch.optim.Adam([torch.ones(1)])}, TypeError, r"optim=\(torch\.optim\.Adam, "),
        ({"optim": {"lr": 1e-3}}, TypeError, r"pyro\.optim\.Adam"),
        ({"num_samples": 5}, TypeError, "Predictive"),
        ({"num_steps": 5}, TypeError, "loop"),
        ({"loss_and_grads": print}, TypeError, "ELBO"),
        ({"cuda_graphs": True}, TypeError, "Did you mean 'cuda_graph'"),
        ({"cuda_graph": "yes"}, ValueError, "'auto'"),
    ],
)
def test_wrong_arguments_are_told(change, error, words):
    model, guide, _, _ = pyro_module()
    given = {"model": model, "guide": guide, "optim": adam(), "loss": Trace_ELBO()} | change
    with pytest.raises(error, match=words):
        SVI(**given)


def test_a_program_without_parameters_is_refused():
    def program():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no parameters"):
        SVI(program, program, adam(), Trace_ELBO()).step()


def test_a_graph_that_must_be_and_cannot_is_an_error():
    model, guide, args, kwargs = pyro_module()
    svi = SVI(model, guide, adam(), Trace_ELBO(), cuda_graph=True)
    svi.step(*args, **kwargs)
    with pytest.raises(ValueError, match="cuda_graph=True, but the model is not on a CUDA device"):
        svi.step(*args, **kwargs)
    svi = SVI(model, guide, pyro.optim.AdagradRMSProp({}), Trace_ELBO(), cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph=True, but"):
        svi.step(*args, **kwargs)


def test_local_parameters_are_refused():
    model, guide, args, kwargs = pyro_module()
    with pyro.settings.context(module_local_params=True), pytest.raises(RuntimeError, match="module_local_params"):
        SVI(model, guide, adam(), Trace_ELBO()).step(*args, **kwargs)


def test_the_namespace_is_imported_when_it_is_asked_for():
    code = (
        "import sys, scalabl_pyro; assert 'scalabl_pyro.infer' not in sys.modules; "
        "assert scalabl_pyro.infer.SVI; from scalabl_pyro.infer import SVI"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
