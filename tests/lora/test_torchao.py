"""Bases that torchao converted, whose weights are tensors of its own classes: trained, drawn from, saved and loaded."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import scalabl_pyro as sp

quantization = pytest.importorskip("torchao.quantization", reason="needs the package torchao")
ROWS = tiny.question_rows(12)


@pytest.fixture(params=["Float8WeightOnlyConfig", "Int8WeightOnlyConfig"])
def llm(request):
    llm = tiny.causal_lm()
    config = getattr(quantization, request.param)()
    quantization.quantize_(llm, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "layers." in name)
    return llm


def test_fit_learns_and_a_posterior_is_saved_and_loaded(llm, tmp_path):
    blora = sp.bayesian_lora(llm, r=4)
    options = {"num_steps": 30, "lr": 2e-2, "kl_weight": 0.01, "progress": False}
    result = sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **options)
    losses = result.history["nll"]
    assert losses.iloc[-5:].mean() < 0.8 * losses.iloc[:5].mean()
    expected = result.posterior.predict(ROWS, num_draws=3, seed=0).log_probs
    assert expected.std(0).min() > 0
    result.posterior.save_pretrained(tmp_path / "posterior")
    blora.unload()
    again = sp.Posterior.from_pretrained(llm, tmp_path / "posterior")
    np.testing.assert_array_equal(again.predict(ROWS, num_draws=3, seed=0).log_probs, expected)
    again.export_peft(tmp_path / "export")
    with pytest.raises(ValueError, match="is quantized, and merging into it would round the draw away"):
        again.merge(1)


def test_memory_counts_codes_at_their_size(llm):
    blora = sp.bayesian_lora(llm, r=4)
    in_blocks = sum(m.in_features * m.out_features for n, m in llm.named_modules() if n.endswith("_proj"))
    found = blora.estimate_memory({"input_ids": torch.ones(2, 8, dtype=torch.long)}).weights
    exact = sp.bayesian_lora(tiny.causal_lm(), r=4)
    full = exact.estimate_memory({"input_ids": torch.ones(2, 8, dtype=torch.long)}).weights
    assert 0.9 * 3 * in_blocks < full - found <= 3 * in_blocks  # one byte in the place of four, and scales


def test_weights_of_torchao_are_not_converted_again(llm):
    with pytest.raises(ValueError, match=r"the weight of 'model.layers.0.self_attn.q_proj' is quantized already, as"):
        sp.bayesian_lora(llm, r=4, base_precision="float8")
