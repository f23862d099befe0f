"""Captured steps on real GPUs: of every prior and guide, and in two processes that talk through NCCL.

``pytest -m gpu tests/distributed/test_gpu_captured.py``. The tests of two processes need two GPUs.
"""

import datetime
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from accelerate import dispatch_model

import scalabl_pyro as sp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from test_capture import ROWS, WAYS, figures, learned

pytestmark = pytest.mark.gpu
CAPTURED = {"used": True, "reason": None}
#: Both runs are float64, but norms and rotations of transformers are float32: a sum in another order rounds otherwise.
WITHIN = 1e-8
#: Ways to train in two processes.
SHARED = ["normal, normal", "horseshoe, lowrank", "hierarchical, full_covariance", "micro-batches", "a shared draw",
          "clipped, with a prior on B and a schedule of the KL"]  # fmt: skip


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")


def needs_two_gpus():
    if torch.cuda.device_count() < 2:
        reason = f"NOT run: it needs two GPUs, and there are {torch.cuda.device_count()}"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)


def train(way, captured, *, device=None, blora=None, num_steps=12, micro=1):
    prior, guide, options = WAYS[way]
    blora = blora or sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64).to(device or "cuda"), r=2, prior=prior)
    hardware = {**options.get("hardware", {}), "cuda_graph": captured}
    if "micro_batch_size" in hardware:
        hardware["micro_batch_size"] *= micro
    settings = {"num_steps": num_steps, "batch_size": len(ROWS), "lr": 1e-2, "progress": False}
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, ROWS, guide=guide, **{**settings, **options, "hardware": hardware})


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= WITHIN * max(np.abs(expected).max(), 1), np.abs(found - expected).max()


@pytest.mark.parametrize("way", WAYS)
def test_a_captured_step_is_an_eager_one(way):
    captured, eager = train(way, "auto"), train(way, False)
    assert captured.posterior.provenance["cuda_graph"] == CAPTURED
    assert eager.posterior.provenance["cuda_graph"]["used"] is False
    assert_close(figures(captured), figures(eager))
    assert_close(learned(captured), learned(eager))


def test_a_step_under_autocast_is_captured():
    found = []
    for captured in ("auto", False):
        blora = sp.bayesian_lora(tiny.causal_lm().cuda(), r=2)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found.append(train("normal, normal", captured, blora=blora))
    assert found[0].posterior.provenance["cuda_graph"] == CAPTURED
    np.testing.assert_allclose(figures(found[0]), figures(found[1]), rtol=2e-3, atol=1e-4)


# several processes --------------------------------------------------------------------------


def in_nccl(rank, folder, ways, poisoned):
    """Train in one of two processes, and write what it has."""
    torch.cuda.set_device(rank)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    found = {}
    for way in ways:
        for captured in ("auto", False):
            result = train(way, captured, device=f"cuda:{rank}")
            told = result.posterior.provenance["cuda_graph"]
            found[way, captured] = learned(result), figures(result), told
    if poisoned:
        found["nan"] = with_nan_in_a_replay(rank)
    torch.save(found, f"{folder}/found.{rank}")
    dist.barrier()
    dist.destroy_process_group()


class PoisonedLater(sp.MultipleChoice):
    """A task whose likelihood is NaN at the tenth call in process 1; the device counts the calls."""

    def __init__(self, tokenizer, rank):
        super().__init__(tokenizer)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.rank = rank

    def likelihood(self, outputs, batch):
        self.calls.add_(1)
        is_bad = (self.calls == 10) & (self.rank == 1)
        return super().likelihood(torch.where(is_bad, torch.nan, outputs), batch)


def with_nan_in_a_replay(rank):
    blora = sp.bayesian_lora(tiny.causal_lm(dtype=torch.float64).to(f"cuda:{rank}"), r=2)
    settings = {"num_steps": 20, "batch_size": len(ROWS), "progress": False, "on_nonfinite": "skip"}
    result = sp.fit(blora, PoisonedLater(tiny.tokenizer(), rank), ROWS, **settings)
    return learned(result), figures(result), result.posterior.provenance["cuda_graph"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes has for each way to train."""
    needs_two_gpus()
    folder = tmp_path_factory.mktemp("nccl")
    torch.multiprocessing.spawn(in_nccl, (str(folder), SHARED, True), nprocs=2)  # a fork could not use CUDA
    return [torch.load(folder / f"found.{rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("way", SHARED)
def test_two_captured_processes_learn_what_one_does(both, way):
    first, second = (found[way, "auto"] for found in both)
    assert first[2] == second[2] == CAPTURED
    assert torch.equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    eager, _ = (found[way, False] for found in both)
    for one in (train(way, "auto", micro=2), train(way, False, micro=2)):
        for parameters, history, _ in (first, eager):
            assert_close(parameters, learned(one))
            assert_close(history, figures(one))


def test_nan_in_a_replayed_step_of_one_process_is_left_out_by_both(both):
    first, second = (found["nan"] for found in both)
    assert first[2] == second[2] == CAPTURED
    assert torch.equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert first[1][-1, -1] == 1 and first[0].isfinite().all()


# one model over several devices ---------------------------------------------------------------


def placed(places):
    """A float64 model whose modules accelerate has put on devices, trained for a few steps."""
    llm = tiny.causal_lm(dtype=torch.float64)
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    dispatch_model(llm, dict(zip(names, places, strict=True)), force_hooks=True)
    return train("clipped, with a prior on B and a schedule of the KL", "auto", blora=sp.bayesian_lora(llm, r=2))


def test_a_device_map_of_one_gpu_changes_nothing():
    mapped, one = placed([0] * 6), train("clipped, with a prior on B and a schedule of the KL", "auto")
    assert_close(learned(mapped), learned(one))


def test_a_model_over_two_gpus_learns_what_one_gpu_does():
    needs_two_gpus()
    mapped, one = placed([0, 0, 1, 1, 0, 1]), placed([0] * 6)
    assert "lies on 2 devices" in mapped.posterior.provenance["cuda_graph"]["reason"]
    assert_close(learned(mapped), learned(one))
    assert_close(figures(mapped), figures(one))
