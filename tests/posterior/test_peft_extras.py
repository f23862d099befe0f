"""What PEFT trained besides LoRA on linear layers stays: when it is adopted, saved, loaded and unloaded."""

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import CASES, QUESTIONS, Case, assert_equal, choose, everything, logits

import scalabl_pyro as sp
from scalabl_pyro.lora.attach import attach


@pytest.mark.parametrize("name", CASES)
def test_an_adopted_model_keeps_its_function_and_comes_back_bit_for_bit(name):
    model = CASES[name].model()
    before, state = logits(model), everything(model)
    assert not torch.allclose(before, logits(CASES[name].base()), atol=1e-3)
    blora = sp.bayesian_lora(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in blora.parameters():
            p.add_(torch.randn_like(p))
    assert blora.unload() is model
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


@pytest.mark.parametrize("name", CASES)
def test_a_posterior_on_an_adopted_model_loads_into_the_plain_base(name, tmp_path):
    case = CASES[name]
    blora = sp.bayesian_lora(case.model())
    posterior = sp.fit(blora, case.task(), case.rows, num_steps=2, lr=0.05, progress=False).posterior
    posterior.save_pretrained(tmp_path / "p")
    assert set(blora.adapter.base_tensors) == case.saved
    assert set(posterior.heads) == case.heads
    base = case.base()
    before, state = logits(base), everything(base)
    loaded = sp.Posterior.from_pretrained(base, tmp_path / "p")
    expected, found = (p.predict(case.rows, num_draws=2, seed=1).log_probs for p in (posterior, loaded))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "posterior.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "p" / file).read_bytes()
    assert loaded.blora().unload() is base
    assert torch.equal(logits(base), before)
    assert_equal(everything(base), state)


def test_a_head_of_peft_starts_anew_on_request():
    case = CASES["own head"]
    blora = sp.bayesian_lora(case.model())
    start = [p.detach().clone() for p in blora.adapter.heads["score"].parameters()]
    sp.fit(blora, case.task(), case.rows, num_steps=2, lr_A=0.05, progress=False)
    sp.fit(blora, case.task(), case.rows, num_steps=1, lr_A=1e-9, progress=False, reset=True)
    for p, first in zip(blora.adapter.heads["score"].parameters(), start, strict=True):
        torch.testing.assert_close(p, first, atol=1e-6, rtol=0)


def test_a_base_that_carries_other_tensors_is_refused(tmp_path):
    blora = sp.bayesian_lora(CASES["head in full"].model())
    posterior = sp.fit(blora, choose(), QUESTIONS, num_steps=1, progress=False).posterior
    posterior.save_pretrained(tmp_path / "p")
    sp.Posterior.from_pretrained(blora.llm, tmp_path / "p")  # the same
    other = CASES["head in full"].model()
    sp.bayesian_lora(other)
    with torch.no_grad():
        other.get_base_model().lm_head.weight.add_(0.1)
    attached = attach(CASES["plain"].model())
    for llm, message in ((other, "lm_head.weight"), (attached.module, "'lm_head.weight' is another tensor")):
        with pytest.raises(ValueError, match=message):
            sp.Posterior.from_pretrained(llm, tmp_path / "p")


def test_a_damaged_list_of_base_tensors_is_refused(tmp_path):
    blora = sp.bayesian_lora(CASES["head in full"].model())
    sp.fit(blora, choose(), QUESTIONS, num_steps=1, progress=False).posterior.save_pretrained(tmp_path / "p")
    config = tmp_path / "p" / "scalabl_config.json"
    text = config.read_text()
    for value, message in (
        ("[]", r"unexpected \['base\.lm_head\.weight'\]"),
        ('["lm_head.weight", "x"]', r"missing \['base\.x'\]"),
        ("[1]", "'base_tensors' must be a list"),
        ("3", "'base_tensors' must be of type list"),
    ):
        config.write_text(re.sub(r'"base_tensors": \[[^]]*\]', f'"base_tensors": {value}', text))
        with pytest.raises(ValueError, match=message):
            sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    config.write_text(text)
    with pytest.raises(ValueError, match=r"lm_head\.weight' is \(59, 32\), expected"):
        sp.Posterior.from_pretrained(tiny.causal_lm(vocab_size=61), tmp_path / "p")


# refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3]),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_methods_of_peft_are_refused(config):
    model = get_peft_model(tiny.causal_lm(), config)
    before, state = logits(model), everything(model)
    with pytest.raises(TypeError, match=r"another PEFT method \(\w+\); only LoRA"):
        sp.bayesian_lora(model)
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


def disabled(model: PeftModel) -> None:
    model.disable_adapter_layers()


def merged(model: PeftModel) -> None:
    model.merge_adapter()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, None, "has no linear layer"),
        ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, None, "LoRA variant"),
        ({"layer_replication": [[0, 2], [1, 2]]}, None, "layer_replication"),
        ({}, disabled, "call enable_adapter_layers"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, merged, "call unmerge_adapter"),
    ],
    ids=["embeddings alone", "DoRA on embeddings", "repeated layers", "disabled", "merged"],
)
def test_an_adapter_that_cannot_be_kept_is_refused(options, change, message):
    model = Case(options).model()
    if change is not None:
        change(model)
    before, state = logits(model), everything(model)
    with pytest.raises(ValueError, match=message):
        sp.bayesian_lora(model)
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


def test_wrapping_that_would_change_the_function_is_refused(monkeypatch):
    from scalabl_pyro.lora import adopt

    model = CASES["plain"].model()
    before, state = logits(model), everything(model)
    wrong = lambda layer, name, **options: 2 * factorize(layer, name, **options)  # noqa: E731
    factorize = adopt.factorize
    monkeypatch.setattr(adopt, "factorize", wrong)
    with pytest.raises(ValueError, match="would change the function"):
        sp.bayesian_lora(model)
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


# changes of the adapter, and saving it by other means -------------------------------------------------------------


def activate_other(model: PeftModel) -> None:
    model.set_adapter("other")


@pytest.mark.parametrize(
    ("change", "undo"),
    [
        (activate_other, lambda model: model.set_adapter("default")),
        (disabled, lambda model: model.enable_adapter_layers()),
    ],
    ids=["set_adapter", "disable_adapter_layers"],
)
def test_another_active_adapter_is_named_and_not_predicted_with(change, undo):
    model = get_peft_model(tiny.causal_lm(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    blora = sp.bayesian_lora(model.eval())
    posterior = sp.fit(blora, choose(), QUESTIONS, num_steps=2, lr=0.05, progress=False).posterior
    before = posterior.predict(QUESTIONS, num_draws=2).log_probs
    change(model)
    calls: dict[str, Callable[[], Any]] = {
        "predict": lambda: posterior.predict(QUESTIONS, num_draws=2),
        "fit": lambda: sp.fit(blora, choose(), QUESTIONS, num_steps=1, progress=False),
        "draw": lambda: posterior.draw().__enter__(),
        "disabled": lambda: blora.disabled().__enter__(),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="The posterior is on the PEFT adapter 'default', but PEFT has"):
            call()
    undo(model)
    np.testing.assert_array_equal(posterior.predict(QUESTIONS, num_draws=2).log_probs, before)


def test_layers_that_peft_takes_out_are_missed():
    model = get_peft_model(tiny.causal_lm(), LoraConfig(r=2, target_modules=["q_proj"]))
    posterior = sp.fit(sp.bayesian_lora(model), choose(), QUESTIONS, num_steps=1, progress=False).posterior
    model.unload()
    with pytest.raises(RuntimeError, match="was taken out of the model"):
        posterior.predict(QUESTIONS, num_draws=2)


@pytest.mark.parametrize("name", ["plain", "add_adapter", "LoraModel", "mixed"])
def test_saving_a_wrapped_model_by_other_means_is_refused(name, tmp_path):
    model = CASES[name].model()
    blora = sp.bayesian_lora(model)
    holders = [m for m in model.modules() if hasattr(type(m), "save_pretrained")]
    assert len(holders) >= 2  # the model and its backbone at least
    for holder in [*holders, copy.deepcopy(model)]:
        if hasattr(holder, "save_pretrained"):
            with pytest.raises(RuntimeError, match=r"posterior\.save_pretrained\(path\), or call blora\.unload\(\)"):
                holder.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    blora.unload()
    blora.llm.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").exists()


def test_saving_a_wrapped_base_model_by_other_means_is_refused(llm, tmp_path):
    expected = logits(llm)
    blora = sp.bayesian_lora(llm)
    with pytest.raises(RuntimeError, match=r"posterior\.save_pretrained"):
        blora.llm.save_pretrained(tmp_path / "m")
    blora.unload().save_pretrained(tmp_path / "m")
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")), expected)
