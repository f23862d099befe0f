"""Which layers are adapted where the user names none, and how to leave layers out."""

import logging

import families
import pytest
import tiny
import torch
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro.lora.module_paths import last_name

DEFAULTS = {
    "bloom": {"query_key_value", "lm_head"},
    "deepseek_v3": {"q_b_proj", "kv_b_proj", "lm_head"},
    "glm4_moe": {"q_proj", "v_proj", "lm_head"},
    "mamba": {"in_proj", "lm_head"},
    "mamba2": {"in_proj", "lm_head"},
    "phi3": {"qkv_proj", "lm_head"},
    "qwen2_moe": {"q_proj", "v_proj", "lm_head"},
    "rwkv": {"key", "value", "receptance", "output", "head"},
}
CLASSIFIER_DEFAULTS = {
    "canine": {"query", "value"},
    "distilbert": {"q_lin", "v_lin"},
    "modernbert": {"Wqkv"},
    "roberta": {"query", "value"},
}


def adapted(llm, **options):
    return {last_name(name) for name in sp.bayesian_lora(llm, r=2, **options).subspace.names}


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_default_of_a_causal_lm_is_attention_and_the_head(family):
    assert adapted(families.causal_lm(family)) == DEFAULTS[family]


@pytest.mark.parametrize("family", CLASSIFIER_DEFAULTS)
def test_the_default_of_a_classifier_is_attention(family):
    assert adapted(families.classifier(family)) == CLASSIFIER_DEFAULTS[family]


def test_a_log_line_says_what_the_default_chose(caplog, llm):
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"):
        sp.bayesian_lora(llm).unload()
    assert "target_modules=None adapts 5 layers: 2 q_proj, 2 v_proj, 1 lm_head" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"):
        sp.bayesian_lora(llm, target_modules=["q_proj"])
    assert "adapts" not in caplog.text  # the user knows


def test_all_linear_leaves_out_the_gate_with_one_output_and_says_so(caplog):
    llm = families.causal_lm("qwen2_moe")
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"), pytest.warns(sp.ScalaBLWarning, match="fused experts"):
        names = adapted(llm, target_modules="all-linear")
    assert {"q_proj", "gate_proj", "lm_head"} <= names and "shared_expert_gate" not in names
    assert "single input or output: 2 shared_expert_gate" in caplog.text


def test_all_linear_leaves_out_what_mixers_read(caplog):
    with caplog.at_level(logging.INFO, logger="scalabl_pyro"):
        assert adapted(families.causal_lm("mamba"), target_modules="all-linear") == {"in_proj", "lm_head"}
    assert "read without being called: 2 x_proj, 2 dt_proj, 2 out_proj" in caplog.text


def test_every_dense_layer_of_a_mixture_of_experts_is_adapted():
    """PEFT takes the dense gate_proj and up_proj of DeepSeek-V3 for experts, and leaves them out."""
    llm = families.causal_lm("deepseek_v3")
    with pytest.warns(sp.ScalaBLWarning, match="fused experts"):
        blora = sp.bayesian_lora(llm, r=2, target_modules="all-linear")
    assert {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.up_proj"} <= set(blora.subspace.names)


# ranks --------------------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.Sequential(nn.Linear(3, 5)))


def test_a_layer_smaller_than_r_is_refused_with_all_ways_out():
    message = r"r=4 .*'2' with weight 3 x 9.*r <= 3.*cut_rank=True, or exclude_modules=\['0', '2'\]"
    with pytest.raises(ValueError, match=message):
        sp.bayesian_lora(net(), r=4)


def test_ranks_are_cut_by_layer_on_request(tmp_path):
    module = net()
    blora = sp.bayesian_lora(module, r=4, lora_alpha=12, cut_rank=True)
    assert blora.subspace.names == ["0", "2", "3.0"]  # "3.0" also ends with ".0"
    assert blora.subspace.ranks == [4, 3, 3]
    assert [tuple(A.shape) for A, _ in blora.adapter.factors()] == [(4, 4), (3, 9), (3, 3)]
    assert [layer.scaling[blora.adapter.adapter_name] for layer in blora.adapter.layers] == [3, 4, 4]  # alpha / rank
    assert blora(torch.ones(2, 4), s=torch.randn(5, 1, 10)).shape == (5, 2, 5)
    assert blora.unload() is module


def test_cut_ranks_are_saved_and_loaded(task, tmp_path):
    blora = sp.bayesian_lora(tiny.causal_lm(), r=20, target_modules=["q_proj", "k_proj"], cut_rank=True)
    assert blora.subspace.ranks == [20, 16, 20, 16]
    posterior = sp.fit(blora, task, tiny.question_rows(4), num_steps=2, progress=False).posterior
    posterior.save_pretrained(tmp_path / "p")
    loaded = sp.Posterior.from_pretrained(tiny.causal_lm(), tmp_path / "p")
    assert loaded.subspace == posterior.subspace
    rows = tiny.question_rows(4)
    assert (loaded.predict(rows, num_draws=2).log_probs == posterior.predict(rows, num_draws=2).log_probs).all()


# exclude_modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "excluded", [["lm_head"], "lm_head|nothing", lambda name, module: name == "lm_head"], ids=["names", "regex", "call"]
)
def test_excluded_layers_are_left_out(llm, excluded):
    assert adapted(llm, exclude_modules=excluded) == {"q_proj", "v_proj"}


def test_one_layer_can_be_excluded_by_a_longer_path(llm):
    names = sp.bayesian_lora(llm, exclude_modules=["1.self_attn.q_proj"]).subspace.names
    assert "model.layers.0.self_attn.q_proj" in names and "model.layers.1.self_attn.q_proj" not in names


@pytest.mark.parametrize(
    ("excluded", "error", "message"),
    [
        (["k_proj"], ValueError, "'k_proj' matches none of the layers to adapt.*'q_proj'"),
        (["q_porj"], ValueError, "exclude_modules: 'q_porj' matches none.*'q_proj'"),
        ("q_proj", ValueError, r"exclude_modules='q_proj' is a regular expression.*\['q_proj'\]"),
        ([], ValueError, r"exclude_modules=\[\] matches none"),
        (lambda *_: True, ValueError, "leaves no layer to adapt.*2 q_proj"),
        (3, TypeError, "exclude_modules=3: expected a list of names"),
        ([3], TypeError, "exclude_modules contains 3"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_wrong_exclusions_are_refused_by_name(llm, excluded, error, message):
    with pytest.raises(error, match=message):
        sp.bayesian_lora(llm, exclude_modules=excluded)


def test_exclusions_of_an_existing_lora_are_refused(llm):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="which decide exclude_modules, cut_rank"):
        sp.bayesian_lora(model, exclude_modules=["q_proj"], cut_rank=True)
