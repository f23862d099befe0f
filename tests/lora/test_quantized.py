"""Bases in 4 and 8 bits, as bitsandbytes stores them: trained, drawn from, saved and given back."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import scalabl_pyro as sp

pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
ROWS = tiny.question_rows(12)


@pytest.fixture(params=["4 bits", "8 bits"])
def llm(request, tmp_path):
    # bitsandbytes packs 4-bit weights for CPUs with AVX512-BF16 by 32 rows, whose blocks are 64 numbers wide.
    tiny.causal_lm(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    if request.param == "4 bits":
        kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    else:
        kind = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kind, device_map="cpu")


def codes_of(llm: nn.Module) -> dict[str, torch.Tensor]:
    """Return the codes in the state: for it, bitsandbytes undoes its packing for a CPU with AVX512-BF16."""
    names = [n for n, p in llm.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params")]
    state = llm.state_dict()
    return {name: state[name].clone() for name in names}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fit_learns_on_a_quantized_base_and_leaves_its_codes_alone(llm, checkpointing):
    before = codes_of(llm)
    assert len(before) == 14  # the linear layers of two blocks; the head stays as it was
    blora = sp.bayesian_lora(llm, r=4)
    options = {"num_steps": 30, "lr": 2e-2, "kl_weight": 0.01, "progress": False}
    result = sp.fit(
        blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, hardware={"gradient_checkpointing": checkpointing}, **options
    )
    losses = result.history["nll"]
    assert losses.iloc[-5:].mean() < 0.7 * losses.iloc[:5].mean()
    blora.unload()
    after = codes_of(llm)
    assert all(torch.equal(after[name].view(-1), codes.view(-1)) for name, codes in before.items())


def test_4_bit_layers_do_not_pack_their_weights(llm):
    """A pass without gradients packs them on some CPUs, and no gradient goes through packed weights."""
    layers = [part for part in llm.modules() if hasattr(part, "support_avx512bf16_for_cpu")]
    before = [part.support_avx512bf16_for_cpu for part in layers]
    blora = sp.bayesian_lora(llm, r=4)
    assert not any(part.support_avx512bf16_for_cpu for part in layers)
    result = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=2, progress=False)
    result.posterior.predict(ROWS, num_draws=2)
    assert not any(getattr(part.weight.quant_state, "packing_format_for_cpu", False) for part in layers)
    sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=2, progress=False)
    blora.unload()
    assert [part.support_avx512bf16_for_cpu for part in layers] == before


def test_two_draws_differ_in_every_quantized_layer(llm):
    blora = sp.bayesian_lora(llm, r=4)
    seen = {}
    for name, layer in zip(blora.subspace.names, blora.adapter.layers, strict=True):
        layer.register_forward_hook(lambda module, args, output, name=name: seen.setdefault(name, []).append(output))
    with torch.no_grad():
        for _, B in blora.adapter.factors():
            B.normal_()
        for seed in range(2):
            s = torch.randn(blora.subspace.dim, generator=torch.Generator().manual_seed(seed))
            blora(input_ids=torch.arange(2, 8).view(1, 6), s=s)
    assert len(seen) == len(blora.subspace)
    assert all(not torch.equal(one, other) for one, other in seen.values())


def test_a_posterior_on_a_quantized_base_is_saved_and_loaded(llm, tmp_path):
    blora = sp.bayesian_lora(llm, r=4)
    posterior = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, num_steps=3, lr=1e-2, progress=False).posterior
    expected = posterior.predict(ROWS, num_draws=3, seed=0).log_probs
    assert expected.std(0).max() > 0
    posterior.save_pretrained(tmp_path / "posterior")
    blora.unload()
    again = sp.Posterior.from_pretrained(llm, tmp_path / "posterior")
    np.testing.assert_array_equal(again.predict(ROWS, num_draws=3, seed=0).log_probs, expected)


def test_memory_counts_codes_and_their_scales_at_their_size(llm):
    blora = sp.bayesian_lora(llm, r=4)
    estimate = blora.estimate_memory({"input_ids": torch.ones(2, 8, dtype=torch.long)})
    frozen = [p for p in llm.parameters() if not p.requires_grad]
    codes = sum(p.untyped_storage().nbytes() for p in frozen)
    scales = [p.quant_state for p in frozen if getattr(p, "quant_state", None) is not None]
    beside = sum(t.numel() * t.element_size() for state in scales for t in (state.absmax, state.code))
    assert codes + beside <= estimate.weights < codes + beside + 5000  # what is left are buffers
