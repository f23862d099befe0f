"""Posteriors on a base in 8-bit floats: trained, drawn from, saved, loaded, merged and exported."""

import json
import re

import numpy as np
import pytest
import tiny
import torch

import scalabl_pyro as sp
from scalabl_pyro.lora.float8 import Float8Linear, precision_of

ROWS = tiny.question_rows(12)
WORDS = ["float8", "float8-compact"]


def fitted(word: str, *, steps: int = 3, dtype: torch.dtype = torch.float32, **options):
    llm = tiny.causal_lm(dtype=dtype)
    blora = sp.bayesian_lora(llm, r=4, base_precision=word)
    task = sp.MultipleChoice(tiny.tokenizer())
    return llm, sp.fit(blora, task, ROWS, num_steps=steps, lr=2e-2, progress=False, **options)


def log_probs(posterior) -> np.ndarray:
    return posterior.predict(ROWS, num_draws=3, seed=0).log_probs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_fit_learns_and_draws_differ(word, checkpointing):
    hardware = {"gradient_checkpointing": checkpointing}
    llm, result = fitted(word, steps=30, kl_weight=0.01, hardware=hardware)
    losses = result.history["nll"]
    assert losses.iloc[-5:].mean() < 0.8 * losses.iloc[:5].mean()
    assert log_probs(result.posterior).std(0).min() > 0
    assert precision_of(llm) == word


def test_both_layouts_and_checkpointing_take_the_same_steps():
    runs = [fitted("float8"), fitted("float8-compact"), fitted("float8", hardware={"gradient_checkpointing": True})]
    first, *others = [result.history["loss"].to_numpy() for _, result in runs]
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("word", WORDS)
def test_the_precision_is_saved_and_applied_again(word, tmp_path):
    llm, result = fitted(word)
    expected = log_probs(result.posterior)
    result.posterior.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scalabl_config.json").read_text())["base_precision"] == word
    again = tiny.causal_lm()
    loaded = sp.Posterior.from_pretrained(again, tmp_path)
    assert precision_of(again) == word
    np.testing.assert_array_equal(log_probs(loaded), expected)
    np.testing.assert_array_equal(log_probs(sp.Posterior.from_pretrained(llm, tmp_path)), expected)


def test_the_precision_can_be_replaced_when_loading(tmp_path):
    _, result = fitted("float8")
    result.posterior.save_pretrained(tmp_path)
    llm = tiny.causal_lm()
    exact = sp.Posterior.from_pretrained(llm, tmp_path, base_precision="original")
    assert precision_of(llm) == "original"
    assert 0 < np.abs(log_probs(exact) - log_probs(result.posterior)).max() < 0.5
    with pytest.raises(ValueError, match=re.escape("with base_precision='original', but")):
        sp.Posterior.from_pretrained(llm, tmp_path)
    sp.Posterior.from_pretrained(llm, tmp_path, base_precision="original")
    with pytest.raises(ValueError, match="base_precision='half'"):
        sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path, base_precision="half")


def test_a_posterior_in_full_precision_loads_in_8_bit_floats_and_old_files_have_full_precision(tmp_path):
    _, result = fitted("original")
    result.posterior.save_pretrained(tmp_path)
    llm = tiny.causal_lm()
    sp.Posterior.from_pretrained(llm, tmp_path, base_precision="float8")
    assert precision_of(llm) == "float8"
    path = tmp_path / "scalabl_config.json"
    config = json.loads(path.read_text())
    del config["base_precision"]
    path.write_text(json.dumps(config | {"format_minor": 1}))
    llm = tiny.causal_lm()
    sp.Posterior.from_pretrained(llm, tmp_path)
    assert precision_of(llm) == "original"


def test_a_wrong_word_in_the_file_is_refused(tmp_path):
    _, result = fitted("float8")
    result.posterior.save_pretrained(tmp_path)
    path = tmp_path / "scalabl_config.json"
    path.write_text(path.read_text().replace('"base_precision": "float8"', '"base_precision": ["float8"]'))
    llm = tiny.causal_lm()
    with pytest.raises(ValueError, match="'base_precision' must be one of original, float8, float8-compact, found"):
        sp.Posterior.from_pretrained(llm, tmp_path)
    assert precision_of(llm) == "original"


def test_a_refused_file_leaves_the_model_in_its_precision(tmp_path):
    _, result = fitted("float8")
    result.posterior.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no layer can be converted"):
        other = tiny.causal_lm()
        for block in other.model.layers:
            for layer in [m for m in block.modules() if isinstance(m, torch.nn.Linear)]:
                layer.register_forward_hook(lambda *args: None)
        sp.Posterior.from_pretrained(other, tmp_path)
    assert not hasattr(other, "peft_config") and type(other.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize("draw", [None, 1])
def test_merging_uses_the_original_weights(draw, tmp_path):
    _, result = fitted("float8")
    posterior = result.posterior
    posterior.save_pretrained(tmp_path)
    exact = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path, base_precision="original")
    merged, expected = posterior.merge(draw), exact.merge(draw)
    assert not any(isinstance(m, Float8Linear) for m in merged.modules())
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[key], value), key
    assert precision_of(posterior.adapter.module) == "float8"


def test_exported_adapters_are_checked_in_the_original_precision(tmp_path):
    _, result = fitted("float8")
    expected = log_probs(result.posterior)
    result.posterior.export_peft(tmp_path / "out", draws=2)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert all(entry["largest_logit_error"] < 1e-5 for entry in index["draws"])
    assert np.array_equal(log_probs(result.posterior), expected)


def test_a_checkpoint_of_another_precision_is_not_resumed(tmp_path):
    fitted("float8", checkpoint={"every": 2}, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="base_precision is None, was 'float8'"):
        fitted("original", steps=3, checkpoint={"every": 2, "resume": True}, checkpoint_dir=tmp_path)


def test_laplace_and_arviz_work():
    _, result = fitted("float8")
    assert sp.laplace(result.posterior, ROWS).predict(ROWS, num_draws=2).log_probs.shape[0] == 2
    idata = result.posterior.to_arviz(num_draws=5)
    assert idata.posterior.sizes["draw"] == 5
