"""A captured step computes what an eager one does, and holds nothing that a CUDA graph forbids.

Tapes on the CPU stand for the graphs of a GPU, see ``cpu_graphs.py``.
"""

import logging

import numpy as np
import pytest
import tiny
import torch
from cpu_graphs import FORBIDDEN, CaptureError, CpuRecorder, Tape, use_tapes
from processes import results, run_together
from pyro.infer import TraceGraph_ELBO, autoguide

import scalabl_pyro as sp
from scalabl_pyro.training.graph_choice import why_not

ROWS = tiny.question_rows(12)
REAL = ["normal", "laplace", "student_t", "empirical", "hierarchical", "horseshoe"]
GUIDES = ["normal", "layer_covariance", "full_covariance", "lowrank", "flow"]
#: Prior, guide, and other options of ``fit``.
WAYS = {f"{prior}, {guide}": (prior, guide, {}) for prior in REAL for guide in GUIDES}
WAYS |= {
    "point": ("normal", "delta", {}),
    "positive": ("lognormal", "normal", {}),
    "masks": ("rank_mask", "rank_mask", {}),
    "pyro's diagonal": ("normal", autoguide.AutoNormal, {}),
    "pyro's covariance": ("hierarchical", autoguide.AutoMultivariateNormal, {}),
    "pyro's low rank": ("hierarchical", autoguide.AutoLowRankMultivariateNormal, {}),
    "pyro's flow": ("normal", autoguide.AutoIAFNormal, {}),
    "pyro's point": ("horseshoe", autoguide.AutoDelta, {}),
    "clipped, with a prior on B and a schedule of the KL": (
        *("normal", "normal"),
        {"optimizer": {"factor_scale": 0.5, "max_grad_norm": 0.5}, "kl_weight": lambda step: 0.1 * step},
    ),
    "micro-batches": ("normal", "normal", {"hardware": {"micro_batch_size": 5}}),
    "a shared draw": ("horseshoe", "lowrank", {"draws": "shared"}),
}


def train(*, prior="normal", guide="normal", captured=True, blora=None, hardware=None, **options):
    """A short fit whose batches all have one shape, on tapes or eagerly."""
    blora = blora or sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64), r=2, prior=prior)
    settings = {"num_steps": 4, "batch_size": len(ROWS), "lr": 1e-2, "progress": False}
    chosen = {**(hardware or {}), "cuda_graph": "auto" if captured else False}
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, ROWS, guide=guide, **{**settings, "hardware": chosen, **options})


def figures(result):
    return result.history.drop(columns="seconds").fillna(-1).to_numpy(float)


def learned(result):
    posterior = result.posterior
    tensors = [*posterior.guide.state_dict().values(), *(t for pair in posterior.factors for t in pair)]
    return torch.cat([t.flatten().double().cpu() for t in tensors])


@pytest.mark.parametrize("way", WAYS)
def test_a_captured_step_is_an_eager_one_and_reads_nothing_on_the_host(way, monkeypatch):
    prior, guide, options = WAYS[way]
    use_tapes(monkeypatch)
    captured = train(prior=prior, guide=guide, **options)
    (recorder,) = CpuRecorder.made
    assert recorder.failure is None and len(recorder.tapes) >= 1
    assert captured.posterior.provenance["cuda_graph"] == {"used": True, "reason": None}
    eager = train(prior=prior, guide=guide, captured=False, **options)
    np.testing.assert_array_equal(figures(captured), figures(eager))
    assert torch.equal(learned(captured), learned(eager))
    assert eager.posterior.provenance["cuda_graph"] == {"used": False, "reason": "cuda_graph=False"}


def test_a_step_under_autocast_is_captured(monkeypatch):
    use_tapes(monkeypatch)
    found = []
    for captured in (True, False):
        blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(train(blora=blora, captured=captured))
    assert CpuRecorder.made[0].failure is None and len(CpuRecorder.made[0].tapes) == 1
    np.testing.assert_array_equal(figures(found[0]), figures(found[1]))


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.linalg.cholesky(torch.eye(2) + 0 * x.sum()),
        lambda x: x[x > 0],
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_a_tape_refuses_what_a_capture_refuses(forbidden):
    with pytest.raises(CaptureError), Tape():
        forbidden(torch.ones(3)) + 0
    assert len(FORBIDDEN) > 5


def test_a_model_that_cannot_be_captured_runs_eagerly_and_the_posterior_says_why(monkeypatch, caplog):
    use_tapes(monkeypatch)
    expected = train(captured=False)
    likelihood = sp.MultipleChoice.likelihood

    def reads(self, outputs, batch):
        assert outputs.mean().item() == outputs.mean().item()
        return likelihood(self, outputs, batch)

    monkeypatch.setattr(sp.MultipleChoice, "likelihood", reads)
    result = train()
    told = result.posterior.provenance["cuda_graph"]
    assert told["used"] is False and "reads a number on the host" in told["reason"]
    assert "steps run without CUDA graphs, which this model does not allow" in caplog.text
    np.testing.assert_array_equal(figures(result), figures(expected))


def test_what_is_not_captured_says_why(caplog):
    with caplog.at_level(logging.INFO):
        on_cpu = train(num_steps=1).posterior.provenance["cuda_graph"]
    assert on_cpu == {"used": False, "reason": "the model is not on a CUDA device"}


def test_an_estimator_that_reads_its_loss_is_not_captured(monkeypatch):
    use_tapes(monkeypatch)
    told = train(elbo=TraceGraph_ELBO(), num_steps=1).posterior.provenance["cuda_graph"]
    assert told == {"used": False, "reason": "this ELBO or guide reads its loss on the host"}
    assert not CpuRecorder.made


# several processes --------------------------------------------------------------------------


def on_tapes(rank, way, failing=None):
    prior, guide, options = WAYS[way]
    use_tapes()
    if failing == rank:
        CpuRecorder._capture = _fail
    result = train(prior=prior, guide=guide, **options)
    (recorder,) = CpuRecorder.made
    told = result.posterior.provenance["cuda_graph"]
    return learned(result), figures(result), len(recorder.tapes), recorder.failure, told


def _fail(self, function):
    self.before = torch.get_rng_state()
    raise RuntimeError("pretend")


IN_PROCESSES = ["normal, normal", "horseshoe, lowrank", "clipped, with a prior on B and a schedule of the KL",
                "a shared draw"]  # fmt: skip


@pytest.mark.parametrize("way", IN_PROCESSES)
def test_two_processes_capture_and_learn_what_one_does(tmp_path, monkeypatch, way):
    prior, guide, options = WAYS[way]
    first, second = results(run_together(on_tapes, tmp_path, way))
    use_tapes(monkeypatch)
    one = train(prior=prior, guide=guide, captured=False, **options)
    assert torch.equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    torch.testing.assert_close(first[0], learned(one), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(first[1], figures(one), rtol=1e-10, atol=1e-10)
    for *_, tapes, failure, _told in (first, second):
        assert failure is None and tapes >= 2  # the gradient, and the update


def test_a_capture_that_fails_in_one_process_is_the_affair_of_that_one(tmp_path, monkeypatch):
    first, second = results(run_together(on_tapes, tmp_path, "normal, normal", 1))
    assert (first[2], first[3]) == (2, None) and (second[2], second[3]) == (0, "pretend")
    assert second[4] == {"used": False, "reason": "pretend"}
    assert torch.equal(first[0], second[0])
    use_tapes(monkeypatch)
    torch.testing.assert_close(first[0], learned(train(captured=False)), rtol=1e-10, atol=1e-10)


def with_a_batch_that_is_nan(rank):
    use_tapes()
    likelihood, calls = sp.MultipleChoice.likelihood, torch.zeros((), dtype=torch.long)

    def spoiled(self, outputs, batch):
        calls.add_(1)  # a replay counts, too
        return likelihood(self, torch.where((calls == 5) & (rank == 1), torch.nan, outputs), batch)

    sp.MultipleChoice.likelihood = spoiled
    result = train(num_steps=7, on_nonfinite="skip")
    return learned(result), figures(result), len(CpuRecorder.made[0].tapes)


def test_nan_in_a_replayed_step_of_one_process_is_left_out_by_both(tmp_path):
    (first, history, tapes), (second, other, _) = results(run_together(with_a_batch_that_is_nan, tmp_path))
    assert tapes == 2 and torch.equal(first, second) and np.array_equal(history, other)
    assert history[-1, -1] == 1 and first.isfinite().all()


def test_dropout_in_several_processes_is_not_captured():
    facts = {"stays_on_device": True, "keeps_prefix": False}
    one = {torch.device("cuda", 0)}
    assert "masks of dropout" in why_not(one, **facts, draws_own_masks=True)
    assert "gather its weights" in why_not(one, **facts, gathers_weights=True)
    assert why_not(one, **facts) is None
