"""The step: Pyro's numbers on the device, no update that is not finite, statistics read late or at once."""

import pyro
import pytest
import tiny
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

import scalabl_pyro as sp
from scalabl_pyro._process.random_state import Stream
from scalabl_pyro.data import encode
from scalabl_pyro.data.training_batches import TrainingBatches
from scalabl_pyro.guides import as_guide
from scalabl_pyro.model.joint import TaskModel
from scalabl_pyro.training.device_elbo import device_loss, stays_on_device
from scalabl_pyro.training.graph_choice import devices_of, why_not
from scalabl_pyro.training.loop import Trainer
from scalabl_pyro.training.objective import Objective, ScopedGuide, default_elbo
from scalabl_pyro.training.optimizer import build_optimizer
from scalabl_pyro.training.step import EagerStep

ROWS = tiny.question_rows(16)


def parts(prior="normal", guide="normal", *, draws="per_example"):
    """Model and guide of a tiny task, and its first batch."""
    task, blora = sp.MultipleChoice(tiny.tokenizer()), sp.bayesian_lora(tiny.causal_lm(), prior=prior)
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_(generator=torch.Generator().manual_seed(0))
    family = as_guide(guide, blora, init_scale=0.3)
    batches = TrainingBatches(encode(ROWS, task.encode, need_target=True), 8, task.pad_token_id, seed=0)
    return TaskModel(blora, task, num_data=40, draws=draws), ScopedGuide(family, draws=draws), batches


def gradients(loss, module):
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    ("prior", "guide", "elbo"),
    [
        ("normal", "normal", TraceMeanField_ELBO()),
        ("normal", "normal", Trace_ELBO(num_particles=2, vectorize_particles=True)),
        ("normal", "normal", Trace_ELBO(num_particles=3)),
        ("laplace", "lowrank", Trace_ELBO()),
        ("normal", AutoMultivariateNormal, Trace_ELBO()),
        ("horseshoe", "normal", TraceMeanField_ELBO()),
        ("rank_mask", "rank_mask", TraceMeanField_ELBO()),
    ],
    ids=["mean field", "vectorized", "three draws", "low rank", "auto", "horseshoe", "masks"],
)
def test_the_loss_and_its_gradient_are_those_of_pyro(prior, guide, elbo, kl_weight):
    model, scoped, batches = parts(prior, guide, draws="shared" if isinstance(guide, type) else "per_example")
    both = torch.nn.ModuleList([model, scoped])
    found = []
    elbo.max_plate_nesting = 2  # guessing it would draw
    with pyro.settings.context(module_local_params=True), torch.random.fork_rng():
        for fn in (device_loss, lambda elbo, *args: elbo.differentiable_loss(*args)):
            torch.manual_seed(1)
            loss = fn(elbo, model, scoped, batches(0), kl_weight)
            found.append((loss.detach(), gradients(loss, both)))
    (ours, our_slopes), (pyros, pyro_slopes) = found
    torch.testing.assert_close(ours, torch.as_tensor(pyros), rtol=1e-5, atol=1e-4)
    for name, slope in pyro_slopes.items():
        assert (slope is None) == (our_slopes[name] is None), name
        if slope is not None:
            torch.testing.assert_close(our_slopes[name], slope, rtol=1e-4, atol=1e-5, msg=name)


def test_estimators_of_other_kinds_are_left_to_pyro():
    assert not stays_on_device(TraceGraph_ELBO())

    class Mine(Trace_ELBO):
        pass

    assert not stays_on_device(Mine())


def trainer(*, read_every=1, poison=None, max_grad_norm=None):
    """A trainer whose batch of step ``poison`` has NaN logits, and the module it trains."""
    model, scoped, batches = parts()
    objective = Objective(default_elbo(scoped.guide, model.blora.prior), model, scoped)
    optimizer = build_optimizer(model, scoped.guide, lr=1e-2, lr_A=1e-2, lr_loc=1e-2, lr_scale=1e-2, weight_decay=0.0)
    step = EagerStep(objective, optimizer, device=torch.device("cpu"), max_grad_norm=max_grad_norm)
    likelihood = model.task.likelihood

    def poisoned(outputs, batch):
        bad = torch.equal(batch.index.sort().values, batches(poison).index.sort().values) if poison else False
        return likelihood(outputs * torch.nan if bad else outputs, batch)

    model.task.likelihood = poisoned
    return Trainer(
        step,
        batches=batches,
        noise=Stream(0),
        kl_weight=lambda step: 1.0,
        rate=lambda step: 1.0 / (1 + step),
        lr=1e-2,
        num_data=40,
        read_every=read_every,
    ), objective


def run(made, steps):
    return list(made.run(range(steps)))


@pytest.mark.parametrize("read_every", [2, 3, 10])
def test_reading_late_changes_nothing(read_every):
    (one, first), (other, second) = trainer(), trainer(read_every=read_every)
    rows, again = run(one, 7), run(other, 7)
    drop = lambda row: {k: v for k, v in row.items() if k != "seconds"}  # noqa: E731
    assert list(map(drop, rows)) == list(map(drop, again))
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 / (1 + step) for step in range(7)])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("read_every", [1, 2, 5])
def test_nothing_moves_from_a_step_that_is_not_finite_on(read_every):
    """However late the host looks, parameters and moments are those from before the bad step."""
    clean, expected = trainer()
    run(clean, 1)
    bad, objective = trainer(read_every=read_every, poison=1)
    with pytest.raises(FloatingPointError, match=r"At step 1: the loss is nan: .*Parameters keep their values"):
        run(bad, 5)
    assert len(bad.history) == 1
    for a, b in zip(objective.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [made.execute.optimizer.state_dict()["state"] for made in (bad, clean)]
    for key, state in states[1].items():
        for name, value in state.items():
            assert torch.equal(states[0][key][name], value), name


@pytest.mark.parametrize("prior", ["normal", "rank_mask"])
def test_a_step_traces_s_and_the_answers_and_nothing_of_the_llm(prior):
    """Sites of each layer would cost hundreds of milliseconds per step."""
    model, scoped, batches = parts(prior)
    with pyro.settings.context(module_local_params=True), torch.random.fork_rng():
        traces = [pyro.poutine.trace(program).get_trace(batches(0)) for program in (model, scoped)]
    names = [[*t.stochastic_nodes, *t.observation_nodes] for t in traces]
    plates = {"data", "rows"}
    assert [set(found) - plates for found in names] == [{"s", "label"}, {"s"}]
    assert all(len(found) <= 3 for found in ([n for n in found if n not in plates] for found in names))


def test_a_model_over_several_devices_is_not_captured():
    """Learning rates of a captured step are tensors on one device, so layers on another could not learn."""
    facts = {"stays_on_device": True, "keeps_prefix": False}
    one, two, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    assert why_not({one}, **facts) is None
    assert why_not({cpu}, **facts) == "the model is not on a CUDA device"
    for devices in ({one, two}, {one, cpu}):
        assert "lies on 2 devices" in why_not(devices, **facts)
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")])
    assert devices_of(module.requires_grad_(False)) == {cpu, torch.device("meta")}
