"""Completions on a GPU: captured steps, scores and generation are those of eager passes and of the CPU."""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from completions import rows, tokenizer

import scalabl_pyro as sp
from scalabl_pyro.lora.token_log_probs import TokenLogProbs
from scalabl_pyro.tasks import completion

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from _support.random_llms import random_llm
from _support.random_texts import random_texts, word_tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")


def result_of(*, family="llama", dtype=torch.float32, **options):
    llm = tiny.causal_lm(family).to(dtype).cuda()
    settings = {"num_steps": 25, "batch_size": 6, "lr": 1e-2, "lr_A": 1e-2, "progress": False, "seed": 0}
    return sp.fit(sp.bayesian_lora(llm), sp.Completion(tokenizer()), rows(24), **{**settings, **options})


def on_cpu(posterior):
    module = copy.deepcopy(posterior.adapter.module).cpu()
    adapter = sp.lora.attach.find_adapter(module)
    return sp.Posterior(adapter, posterior.task, posterior.prior, posterior.guide, posterior.factors)


@pytest.mark.parametrize("micro_batch_size", [None, 4], ids=["whole batches", "micro-batches"])
@pytest.mark.parametrize("max_logits", [2**25, 64], ids=["one part", "many parts"])
def test_captured_steps_have_the_losses_of_eager_ones(micro_batch_size, max_logits, caplog, monkeypatch):
    monkeypatch.setattr(completion, "TokenLogProbs", functools.partial(TokenLogProbs, max_logits=max_logits))
    hardware = {"micro_batch_size": micro_batch_size}
    eager = result_of(hardware={**hardware, "cuda_graph": False})
    captured = result_of(hardware=hardware)
    assert "without CUDA graphs" not in caplog.text, caplog.text
    for name in ("loss", "nll", "kl", "grad_norm", "nll_per_token"):
        np.testing.assert_allclose(captured.history[name], eager.history[name], rtol=2e-3, atol=1e-4, err_msg=name)
    assert eager.history["nll"].iloc[-5:].mean() < eager.history["nll"].iloc[:5].mean()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_scores_on_a_gpu_are_those_on_the_cpu(family):
    posterior = result_of(family=family).posterior
    here = posterior.score(rows(24), num_draws=4)
    there = on_cpu(posterior).score(rows(24), num_draws=4)
    np.testing.assert_allclose(here.log_probs, there.log_probs, atol=2e-3)
    np.testing.assert_allclose(here.to_frame()["epistemic"], there.to_frame()["epistemic"], atol=2e-3)


@pytest.mark.parametrize("decode", ["draws", "mixture", "mean"])
def test_a_text_has_the_scores_that_generation_gave_it(decode):
    posterior = result_of().posterior
    prompts = [row["prompt"] for row in rows(6)]
    num_draws = 1 if decode == "mean" else 4
    written = posterior.generate(prompts, num_draws=num_draws, decode=decode, max_new_tokens=6, seed=1)
    again = on_cpu(posterior).generate(prompts, num_draws=num_draws, decode=decode, max_new_tokens=6, seed=1)
    assert written.answers == again.answers
    assert posterior.generate(prompts, num_draws=num_draws, decode=decode, max_new_tokens=6, seed=1).answers == (
        written.answers
    )


def test_bfloat16_learns_and_writes():
    posterior = result_of(dtype=torch.bfloat16, num_steps=60).posterior
    scored = posterior.score(rows(24), num_draws=4)
    assert np.isfinite(scored.log_probs).all() and (scored.to_frame()["epistemic"] > -1e-6).all()
    written = posterior.generate(["the sky is"], num_draws=3, num_samples=2, do_sample=True, max_new_tokens=4, seed=0)
    assert written.to_frame().shape[0] == 6


def test_a_row_of_8192_tokens_of_a_7b_model_trains_within_40_gib():
    """Logits of 8,192 tokens and 152,064 words would take 4.6 GiB in float32, and as much again for their gradient."""
    if torch.cuda.get_device_properties(0).total_memory < 44 * 2**30:
        pytest.skip("needs a GPU of 48 GB")
    llm = random_llm("qwen2.5-7b", "cuda", torch.bfloat16)
    weights = torch.cuda.memory_allocated()
    blora, task = sp.bayesian_lora(llm), sp.Completion(word_tokenizer())
    text = random_texts(1, 8192)
    estimate = blora.estimate_memory(text, task=task, gradient_checkpointing=True).total
    torch.cuda.reset_peak_memory_stats()
    options = {"num_steps": 4, "batch_size": 1, "progress": False, "hardware": {"gradient_checkpointing": True}}
    history = sp.fit(blora, task, text, **options).history
    peak = torch.cuda.max_memory_allocated()
    assert np.isfinite(history["loss"]).all() and len(history) == 4
    assert weights < peak < 40 * 2**30
    assert estimate == pytest.approx(peak, rel=0.25)
