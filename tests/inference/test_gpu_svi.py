"""On a GPU, ``scalabl_pyro.infer.SVI`` replays its steps, and they equal eager steps of stock SVI."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro.infer import SVI as StockSVI
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import scalabl_pyro as sp
from scalabl_pyro.infer import SVI

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("stock_pyro")]
N, ROWS, STEPS = 40, 6, 8


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")


def batch(tokens=7):
    ids = torch.arange(2, 2 + tokens * ROWS, device="cuda").view(ROWS, tokens) % 50 + 2
    return ids, torch.ones_like(ids), torch.arange(ROWS, device="cuda") % 4


class Program:
    """The model of the README in float64, and how often Python runs it."""

    def __init__(self, family=AutoNormal):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        torch.cuda.manual_seed(0)
        self.blora = sp.bayesian_lora(tiny.causal_lm().double().cuda(), r=2, target_modules=["q_proj", "v_proj"])
        self.calls = 0
        self.guide = family(self.model, init_loc_fn=self.blora.init_loc, init_scale=0.05)

    def model(self, ids, mask, labels=None):
        self.calls += 1
        logits = self.blora(input_ids=ids, attention_mask=mask, positions=mask.sum(1) - 1).logits[..., 0, 21:25]
        with pyro.plate("data", N, subsample_size=len(ids)):
            pyro.sample("label", dist.Categorical(logits=logits), obs=labels)


def adam():
    return pyro.optim.Adam({"lr": 1e-2})


def clipped():
    return pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.95, "clip_norm": 1.0})


def steps(kind, optim, elbo, family=AutoNormal, **options):
    program = Program(family)
    svi = kind(program.model, program.guide, optim(), elbo(), **options)
    losses = [svi.step(*batch()) for _ in range(STEPS)]
    stored = pyro.get_param_store().named_parameters()
    return losses, {name.split("$$$")[-1]: value.detach().clone() for name, value in stored}, svi


@pytest.mark.parametrize(
    ("optim", "elbo", "family"),
    [
        (adam, Trace_ELBO, AutoNormal),
        (adam, lambda: Trace_ELBO(num_particles=3), AutoNormal),
        (clipped, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True), AutoNormal),
        (lambda: pyro.optim.AdamW({"lr": 1e-2}, {"clip_norm": 1.0}), TraceMeanField_ELBO, AutoNormal),
        (lambda: pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9}), Trace_ELBO, AutoDiagonalNormal),
    ],
)
def test_captured_steps_equal_eager_ones_of_stock_svi(optim, elbo, family, caplog):
    expected, values, _ = steps(StockSVI, optim, elbo, family)
    found, own, svi = steps(SVI, optim, elbo, family, cuda_graph=True)
    assert svi.num_captured == 1 and "without CUDA graphs" not in caplog.text, caplog.text
    assert found == pytest.approx(expected, rel=1e-6)
    for name, value in values.items():
        torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-6)
    eager = steps(SVI, optim, elbo, family, cuda_graph=False)
    assert eager[2].num_captured == 0 and eager[0] == pytest.approx(expected, rel=1e-6)


def test_python_runs_until_the_capture_and_not_in_replays():
    program = Program()
    svi = SVI(program.model, program.guide, adam(), Trace_ELBO())
    counts = []
    for _ in range(6):
        svi.step(*batch())
        counts.append(program.calls)
    assert counts[1] < counts[2] == counts[3] == counts[5] and svi.num_captured == 1
    for _ in range(3):
        svi.step(*batch(9))
    assert svi.num_captured == 2
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}
    assert svi.step(*batch()) != svi.step(*batch())  # noise is new in each replay
    moved = {n for n, v in pyro.get_param_store().named_parameters() if not torch.equal(v, before[n])}
    assert moved == set(before)


def test_a_rate_is_read_at_each_replay():
    program = Program()
    svi = SVI(program.model, program.guide, adam(), Trace_ELBO())
    for _ in range(4):
        svi.step(*batch())
    for group in svi._joint.optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}
    svi.step(*batch())
    assert svi.num_captured == 1
    assert all(torch.equal(v, before[n]) for n, v in pyro.get_param_store().named_parameters())


def test_a_model_that_reads_on_the_host_trains_eagerly_and_says_so(caplog):
    program = Program()

    def model(ids, mask, labels=None):
        if mask.sum().item() > 0:
            program.model(ids, mask, labels)

    with caplog.at_level(logging.INFO, "scalabl_pyro"):
        svi = SVI(model, program.guide, adam(), Trace_ELBO())
        losses = [svi.step(*batch()) for _ in range(5)]
    expected, _, _ = steps(StockSVI, adam, Trace_ELBO)
    assert losses == pytest.approx(expected[:5], rel=1e-6)
    assert svi.num_captured == 0 and caplog.text.count("without CUDA graphs") == 1


@pytest.mark.parametrize(("elbo", "move"), [(TraceGraph_ELBO, True), (Trace_ELBO, False)])
def test_what_is_not_captured_is_told(elbo, move, caplog):
    program = Program()

    def model(ids, mask, labels=None):
        program.model(ids.cuda(), mask.cuda(), None if labels is None else labels.cuda())

    guide = AutoNormal(model, init_loc_fn=program.blora.init_loc, init_scale=0.05)
    svi = SVI(model, guide, adam(), elbo())
    with caplog.at_level(logging.INFO, "scalabl_pyro"):
        for _ in range(4):
            svi.step(*(t if move else t.cpu() for t in batch()))
    assert svi.num_captured == 0 and caplog.text.count("without CUDA graphs") == 1
    assert ("reads its loss" if move else "move it before the step") in caplog.text


def test_a_state_moves_between_a_gpu_and_stock_svi(tmp_path):
    whole, values, _ = steps(StockSVI, adam, Trace_ELBO)
    program = Program()
    svi = SVI(program.model, program.guide, adam(), Trace_ELBO())
    losses = [svi.step(*batch()) for _ in range(4)]
    svi.optim.save(str(tmp_path / "state"))
    again = adam()
    again.load(str(tmp_path / "state"))
    losses += [(svi := StockSVI(program.model, program.guide, again, Trace_ELBO())).step(*batch())]
    losses += [svi.step(*batch()) for _ in range(STEPS - 5)]
    assert losses == pytest.approx(whole, rel=1e-6)
    stored = pyro.get_param_store().named_parameters()
    for name, value in stored:
        torch.testing.assert_close(value.detach(), values[name.split("$$$")[-1]], rtol=1e-6, atol=1e-6)
