"""The same code on a GPU in bfloat16: run with `make test-gpu` where there is one."""

import copy

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp

pytestmark = pytest.mark.gpu
ROWS = tiny.question_rows(24)


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")


def base(dtype=torch.bfloat16, family="llama"):
    return tiny.causal_lm(family).to(dtype)  # the same weights in every precision


def fitted(dtype=torch.bfloat16, family="llama", **options):
    llm = base(dtype, family).cuda()
    blora = sp.bayesian_lora(llm)
    task = sp.MultipleChoice(tiny.tokenizer())
    return sp.fit(blora, task, ROWS, **{"num_steps": 30, "lr": 1e-2, "progress": False, **options}).posterior


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma", "gpt2"])
def test_it_learns_in_bfloat16(family):
    posterior = fitted(family=family, num_steps=150)
    prediction = posterior.predict(ROWS, num_draws=8)
    assert prediction.log_probs.dtype == np.float32
    assert prediction.metrics().loc["value", "accuracy"] > 0.8
    assert prediction.epistemic.max() > 0


def test_latents_and_factors_stay_float32_and_the_posterior_lives_on_the_cpu():
    posterior = fitted()
    assert all(t.dtype == torch.float32 and t.is_cuda for pair in posterior.adapter.factors() for t in pair)
    assert posterior.guide.loc.device.type == "cpu"
    assert posterior.sample(3).s.device.type == "cpu"


def test_draws_are_those_of_the_cpu_and_predictions_agree():
    posterior = fitted(dtype=torch.float32)
    on_gpu = posterior.predict(ROWS, num_draws=4)
    on_cpu = copy.deepcopy(posterior.adapter.module).cpu()
    adapter = sp.attach.find_adapter(on_cpu)
    twin = sp.Posterior(adapter, posterior.task.cpu(), posterior.prior, posterior.guide, posterior.factors)
    np.testing.assert_allclose(twin.predict(ROWS, num_draws=4).log_probs, on_gpu.log_probs, atol=2e-3)


def test_it_saves_and_loads_across_devices(tmp_path):
    posterior = fitted()
    before = posterior.predict(ROWS, num_draws=4)
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(base().cuda(), tmp_path / "p")
    np.testing.assert_array_equal(loaded.predict(ROWS, num_draws=4).log_probs, before.log_probs)
    on_cpu = sp.Posterior.from_pretrained(base(torch.float32), tmp_path / "p")
    assert torch.equal(on_cpu.sample(4).s, posterior.sample(4).s)
    np.testing.assert_allclose(on_cpu.predict(ROWS, num_draws=4).probs, before.probs, atol=0.05)


def test_equal_seeds_are_equal_and_no_random_state_moves():
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
    a, b = fitted(num_steps=5), fitted(num_steps=5)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert torch.equal(torch.cuda.get_rng_state(), cuda)
    torch.testing.assert_close(a.guide.loc, b.guide.loc, rtol=1e-3, atol=1e-4)


def test_one_batch_and_chunks_agree():
    posterior = fitted()
    whole = posterior.predict(ROWS, num_draws=8)
    parts = posterior.predict(ROWS, num_draws=8, draws_per_pass=3, batch_size=5)
    np.testing.assert_allclose(whole.probs, parts.probs, atol=0.02)


def test_a_real_out_of_memory_halves_the_draws(monkeypatch, caplog):
    posterior = fitted()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(max(free - 400 * 2**20, 0), dtype=torch.uint8, device="cuda")
    try:
        prediction = posterior.predict(ROWS * 40, num_draws=256, batch_size=960)
    finally:
        del hog
        torch.cuda.empty_cache()
    assert prediction.log_probs.shape[0] == 256
    assert "out of memory: going on with" in caplog.text


def test_a_classifier_with_a_new_head_trains():
    llm = tiny.classifier("bert", dtype=torch.bfloat16).cuda()
    task = sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])
    posterior = sp.fit(sp.bayesian_lora(llm), task, tiny.text_rows(24), num_steps=3, progress=False).posterior
    assert posterior.heads["classifier"].weight.dtype == torch.float32
    assert np.isfinite(posterior.predict(tiny.text_rows(6), num_draws=3).log_probs).all()
