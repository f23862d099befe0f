"""Models that something else has wrapped, moved or switched: right, or refused in words."""

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from torch import nn

import scalabl_pyro as sp

IDS = torch.arange(2, 14).view(2, 6)


def compiled(module):
    return torch.compile(module, backend="eager")


def topics():
    return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"]), tiny.text_rows(8)


# torch.compile ------------------------------------------------------------------------------------------------


def test_a_compiled_module_is_adapted_as_the_plain_one(tmp_path, caplog):
    task, rows = topics()
    plain = tiny.classifier("llama")
    module = compiled(plain)
    blora = sp.bayesian_lora(module, r=2)
    assert "runs without torch.compile" in caplog.text
    assert list(blora.adapter.heads) == ["score"]
    assert blora.subspace.names[0] == "model.layers.0.self_attn.q_proj"
    posterior = sp.fit(blora, task, rows, num_steps=2, progress=False).posterior
    posterior.save_pretrained(tmp_path / "p")
    expected = posterior.predict(rows, num_draws=2).log_probs
    assert blora.unload() is module
    for base in (tiny.classifier("llama"), compiled(tiny.classifier("llama"))):
        loaded = sp.Posterior.from_pretrained(base, tmp_path / "p")
        np.testing.assert_array_equal(loaded.predict(rows, num_draws=2).log_probs, expected)


def test_a_part_that_is_compiled_by_itself_is_refused_with_the_way_out():
    llm = tiny.causal_lm()
    llm.model.layers[1] = compiled(llm.model.layers[1])
    with pytest.raises(ValueError, match=r"'model.layers.1' is compiled by itself.*block.compile\(\)"):
        sp.bayesian_lora(llm, r=2)


@pytest.mark.slow  # dynamo alone takes seconds to load
def test_parts_compiled_in_place_compute_the_same(blora):
    llm = tiny.causal_lm()
    for block in llm.model.layers:
        block.compile(backend="eager")
    other = sp.bayesian_lora(llm)
    with torch.no_grad():
        for (_, B), (_, twin) in zip(blora.adapter.factors(), other.adapter.factors(), strict=True):
            B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(0)))
            twin.copy_(B)
        for seed in range(2):  # draws are inputs, no constants of the compiled code
            s = torch.randn(2, 1, blora.subspace.dim, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(other(input_ids=IDS, s=s).logits, blora(input_ids=IDS, s=s).logits)


# autocast -----------------------------------------------------------------------------------------------------


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("guide", ["normal", "full_covariance"])
def test_predictions_under_autocast_use_the_same_draws(guide, task):
    rows = tiny.question_rows(8)
    blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
    posterior = sp.fit(blora, task, rows, num_steps=3, guide=guide, progress=False).posterior
    expected = posterior.predict(rows, num_draws=3, seed=0)
    draws = posterior.sample(3, seed=0)
    with autocast():
        prediction = posterior.predict(rows, num_draws=3, seed=0)
        assert torch.equal(posterior.sample(3, seed=0).s, draws.s)
    assert prediction.log_probs.dtype == np.float32
    np.testing.assert_allclose(np.exp(prediction.log_probs), np.exp(expected.log_probs), atol=0.01)  # bfloat16


@pytest.mark.parametrize("gauge", ["unit_rows", "free"])
def test_a_pass_under_autocast_sees_the_factors_after_a_step(gauge):
    """Autocast caches half precision copies of parameters as long as its context lasts."""
    blora = sp.bayesian_lora(tiny.classifier("llama"), r=2, gauge=gauge)
    s = torch.ones(blora.subspace.dim)
    with autocast():
        before = blora(input_ids=IDS, s=s).logits
        with torch.no_grad():
            for parameter in blora.point_estimates.parameters():
                parameter.add_(0.5)
        after = blora(input_ids=IDS, s=s).logits
    with autocast():
        fresh = blora(input_ids=IDS, s=s).logits
    assert torch.equal(after, fresh)
    assert not torch.equal(before, after)


def test_fit_under_autocast_learns(task):
    rows, losses = tiny.question_rows(16), []
    for context in (torch.no_grad, autocast):
        blora = sp.bayesian_lora(tiny.causal_lm(), r=2)
        with context() if context is autocast else torch.enable_grad():
            history = sp.fit(blora, task, rows, num_steps=10, lr=2e-2, progress=False).history
        losses.append(history["loss"].to_numpy())
    np.testing.assert_allclose(losses[1], losses[0], atol=0.02)


# weights that are elsewhere -----------------------------------------------------------------------------------


def test_offloaded_weights_are_refused_and_the_module_is_left_alone():
    llm = tiny.causal_lm()
    cpu_offload(llm, execution_device=torch.device("cpu"))
    modules = dict(llm.named_modules())
    with pytest.raises(ValueError, match=r"offloaded by accelerate.*'model.embed_tokens'.*without offloading"):
        sp.bayesian_lora(llm, r=2)
    assert dict(llm.named_modules()) == modules


def test_weights_of_which_some_are_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match=r"on the meta device, for instance those of '1\.weight'"):
        sp.bayesian_lora(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), r=1)


def test_a_model_on_the_meta_device_can_be_counted_but_not_trained(task, tmp_path, fitted):
    with torch.device("meta"):
        llm = tiny.causal_lm()
    blora = sp.bayesian_lora(llm)
    assert blora.num_parameters()["latents"] == 40
    with pytest.raises(ValueError, match="on the meta device: its weights have no values"):
        sp.fit(blora, task, tiny.question_rows(4), num_steps=1, progress=False)
    fitted.posterior.save_pretrained(tmp_path / "p")
    blora.unload()
    with pytest.raises(ValueError, match="on the meta device: its weights have no values"):
        sp.Posterior.from_pretrained(llm, tmp_path / "p")
