"""An adapter that PEFT trained becomes Bayesian: the function stays, and what does not fit is refused."""

import copy
import json
import logging
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import CASES, Case, assert_equal, everything, logits
from safetensors.torch import load_file, save_file

import scalabl_pyro as sp

Q_AND_V = ["q_proj", "v_proj"]
PLAIN_KINDS = {
    "plain": {"target_modules": Q_AND_V},
    "rsLoRA": {"target_modules": Q_AND_V, "use_rslora": True, "lora_alpha": 3},
    "rank_pattern": {"target_modules": Q_AND_V, "rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 3}},
    "alpha_pattern": {"target_modules": Q_AND_V, "alpha_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 1}},
    "rank above the width": {"target_modules": Q_AND_V, "r": 40},
    "rank above the keys": {"target_modules": ["k_proj"], "r": 20},
    "all linear": {"target_modules": "all-linear", "r": 5},
}


def double(case: Case):
    return case.model().double()


@pytest.mark.parametrize("spectrum", [False, True])
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_a_lora_adapter_keeps_its_function_exactly(kind, spectrum):
    model = double(Case(PLAIN_KINDS[kind]))
    before, state = logits(model), everything(model)
    blora = sp.from_peft(model, spectrum=spectrum)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    assert blora.unload() is model
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_adapter_keeps_its_function(name):
    model = double(CASES[name])
    before = logits(model)
    sp.from_peft(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


def test_the_rank_of_a_layer_is_cut_to_the_smaller_side_of_its_weight():
    """A head with 3 outputs and LoRA of rank 8 has an update of rank 3 at most."""
    config = LoraConfig(r=8, target_modules=["score", "q_proj"])
    model = get_peft_model(tiny.classifier().double(), config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    before = logits(model)
    blora = sp.from_peft(model)
    assert dict(zip(blora.subspace.names, blora.subspace.ranks, strict=True))["score"] == 3
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)
    blora.unload()
    assert model.get_base_model().score.r["default"] == 8
    assert torch.equal(logits(model), before)


def test_spectrum_puts_the_singular_values_of_the_update_into_s():
    model = double(Case({"target_modules": Q_AND_V, "lora_alpha": 6}))
    updates = {n: m.get_delta_weight("default") for n, m in model.get_base_model().named_modules() if hasattr(m, "r")}
    blora = sp.from_peft(model, spectrum=True)
    for layer, s in zip(blora.subspace, blora.subspace.split(blora.adapter.loc), strict=True):
        expected = torch.linalg.svdvals(updates[layer.name])[: layer.rank]
        torch.testing.assert_close(s, expected, rtol=1e-10, atol=1e-12)
    constant = sp.from_peft(double(Case({"target_modules": Q_AND_V})))
    torch.testing.assert_close(constant.adapter.loc, torch.full_like(constant.adapter.loc, 3**-0.5))


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_an_adapter_is_read_from_its_folder(kind, tmp_path):
    model = double(Case(PLAIN_KINDS[kind]))
    model.save_pretrained(tmp_path / "adapter")
    blora = sp.from_peft(tiny.causal_lm().double(), tmp_path / "adapter")
    torch.testing.assert_close(logits(blora.llm), logits(model), rtol=0, atol=1e-10)
    assert isinstance(blora.unload(), PeftModel)


def test_a_classifier_comes_in_with_its_head(tmp_path):
    case = CASES["own head"]
    model = case.model()
    model.save_pretrained(tmp_path / "adapter")
    blora = sp.from_peft(case.base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(blora.llm), logits(model), rtol=1e-5, atol=1e-6)
    assert set(blora.adapter.heads) == {"score"}


# other methods ----------------------------------------------------------------------------------------------

OTHERS = {
    "LoHa": (peft.LoHaConfig(r=2, target_modules=Q_AND_V), 1e-2),
    "LoKr": (peft.LoKrConfig(r=2, target_modules=Q_AND_V), 3e-2),
    "VeRA": (peft.VeraConfig(r=4, target_modules=["q_proj"]), 1e-2),
    "RandLoRA": (peft.RandLoraConfig(r=4, target_modules=["q_proj"]), 5e-2),
    "MiSS": (peft.MissConfig(r=4, target_modules=["q_proj"]), 1e-5),
}


def with_values(model: PeftModel) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", OTHERS)
def test_methods_that_peft_converts_come_in_with_their_error_told(method, tmp_path, unchanged_rng):
    config, tolerance = OTHERS[method]
    with torch.random.fork_rng():
        model = with_values(get_peft_model(tiny.causal_lm(), copy.deepcopy(config)))
    before, base = logits(model), logits(tiny.causal_lm())
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        blora = sp.from_peft(tiny.causal_lm(), tmp_path / "adapter", rank=None)
    told = [str(w.message) for w in caught if issubclass(w.category, sp.ScalaBLWarning)]
    assert all("became LoRA of rank" in text and "relative error" in text for text in told)
    assert (logits(blora.llm) - before).abs().max() < tolerance * (before - base).abs().max()


def test_a_small_rank_has_the_error_that_the_warning_tells():
    torch.manual_seed(0)
    model = with_values(get_peft_model(tiny.causal_lm(), peft.LoHaConfig(r=4, target_modules=["q_proj"])))
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "hada_w1_a")}
    values = {n: torch.linalg.svdvals(m.get_delta_weight("default")) for n, m in layers.items()}
    worst = max(float(v[3:].norm() / v.norm()) for v in values.values())
    with pytest.warns(sp.ScalaBLWarning, match=f"of rank 3.*at most {worst:.2%}"):
        blora = sp.from_peft(model, rank=3)
    assert set(blora.subspace.ranks) == {3}


def test_a_conversion_keeps_modules_that_were_trained_in_full(caplog):
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    torch.manual_seed(0)
    model = with_values(get_peft_model(tiny.causal_lm(), config))
    before = logits(model)
    with caplog.at_level(logging.INFO):
        blora = sp.from_peft(model, rank=4)  # 2 * 2: the update has rank 4
    assert "became LoRA of rank 4 without an error" in caplog.text
    torch.testing.assert_close(logits(blora.llm), before, rtol=1e-4, atol=1e-4)
    assert set(blora.adapter.base_tensors) == {"lm_head.weight"}


def test_dora_comes_in_while_its_magnitudes_are_the_norms_and_is_refused_afterwards():
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(tiny.causal_lm(), config).eval()
    before = logits(model)
    blora = sp.from_peft(model, rank=2)
    torch.testing.assert_close(logits(blora.llm), before, rtol=1e-5, atol=1e-5)
    model = with_values(get_peft_model(tiny.causal_lm(), config))
    before, state = logits(model), everything(model)
    with pytest.raises(TypeError, match=r"DoRA with trained magnitudes.*merge_and_unload"):
        sp.from_peft(model, rank=2)
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "PEFT cannot turn an adapter of.*IA3"),
        (peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]), "PEFT cannot turn an adapter of.*OFT"),
        (peft.HiraConfig(r=2, target_modules=["q_proj"]), "PEFT cannot turn an adapter of.*HIRA"),
        (peft.AdaLoraConfig(target_r=2, init_r=4, total_step=10, target_modules=["q_proj"]), "PEFT cannot.*ADALORA"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
            "activated LoRA",
        ),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
    ],
    ids=["IA3", "OFT", "HiRA", "AdaLoRA", "aLoRA", "prompt tuning"],
)
@pytest.mark.parametrize("from_folder", [False, True])
def test_other_methods_are_refused_by_name(config, message, from_folder, tmp_path):
    model = get_peft_model(tiny.causal_lm(), copy.deepcopy(config)).eval()
    given = model
    if from_folder:
        model.save_pretrained(tmp_path / "a")
        given = tiny.causal_lm()
    before, state = logits(given), everything(given)
    with pytest.raises(TypeError, match=message):
        sp.from_peft(given, tmp_path / "a" if from_folder else None)
    assert torch.equal(logits(given), before)
    assert_equal(everything(given), state)


def merged(model) -> None:
    model.merge_adapter()


def disabled(model) -> None:
    model.base_model.disable_adapter_layers()


def second(model) -> None:
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["v_proj"]))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (peft.LoHaConfig(r=2, target_modules=Q_AND_V), merged, "call unmerge_adapter"),
        (peft.LoHaConfig(r=2, target_modules=Q_AND_V), disabled, "call enable_adapter_layers"),
        (peft.LoHaConfig(r=2, target_modules=["q_proj"]), second, r"carries the adapters .*delete_adapter"),
        (peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]), None, "trained '.*mlp' in full"),
        (peft.VeraConfig(r=2, target_modules=["q_proj"], bias="all"), None, "trained biases too"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, trainable_token_indices=[1]),
            None,
            "also trained single tokens",
        ),
    ],
    ids=["merged", "disabled", "two adapters", "a module with parts", "biases", "tokens"],
)
def test_what_cannot_be_converted_is_refused_with_a_way_out(config, change, message):
    model = get_peft_model(tiny.causal_lm(), copy.deepcopy(config)).eval()
    if change is not None:
        change(model)
    before, state = logits(model), everything(model)
    with pytest.raises((TypeError, ValueError), match=message):
        sp.from_peft(model, rank=2)
    assert torch.equal(logits(model), before)
    assert_equal(everything(model), state)


# bad input --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    Case({"target_modules": Q_AND_V}).model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refuse(base, path, error, message) -> None:
    before, state = logits(base), everything(base)
    with pytest.raises(error, match=message):
        sp.from_peft(base, path)
    assert torch.equal(logits(base), before)
    assert_equal(everything(base), state)


def drop_one(tensors) -> None:
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]


def add_layer(tensors) -> None:
    tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)


def other_embeddings(tensors) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(59, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop_one,
            r"not complete, or belongs to another base model: .*layers\.1\.self_attn\.q_proj\.lora_A.*is missing",
        ),
        (add_layer, r"no place for '.*layers\.2\.self_attn\.q_proj"),
        (other_embeddings, r"holds its own values of 'model\.embed_tokens\.weight'.*resized"),
    ],
)
def test_a_file_that_does_not_fit_completely_is_refused(folder, change, message):
    edit(folder, change)
    refuse(tiny.causal_lm(), folder, ValueError, message)


def test_embeddings_in_the_file_that_are_those_of_the_base_are_fine(folder):
    base = tiny.causal_lm()
    edit(
        folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": base.model.embed_tokens.weight.data})
    )
    sp.from_peft(base, folder)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: tiny.causal_lm(hidden_size=48, head_dim=12), "does not fit this model.*size mismatch"),
        (lambda: tiny.causal_lm("gpt2"), "does not fit this model.*not found"),
        (lambda: tiny.causal_lm(num_hidden_layers=3), "not complete, or belongs to another base model"),
        (lambda: tiny.causal_lm(num_hidden_layers=1), "no place for"),
    ],
    ids=["width", "family", "more blocks", "fewer blocks"],
)
def test_an_adapter_of_another_base_is_refused(folder, base, message):
    refuse(base(), folder, ValueError, message)


def test_another_name_of_the_base_is_told(folder):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "meta/llama-1"}))
    base = tiny.causal_lm()
    base.config._name_or_path = "/data/llama-2"
    with pytest.warns(
        sp.ScalaBLWarning, match="names the base model 'meta/llama-1', and this model is '/data/llama-2'"
    ):
        sp.from_peft(base, folder)
    base = tiny.causal_lm()
    base.config._name_or_path = "/data/llama-1/"
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.ScalaBLWarning)
        sp.from_peft(base, folder)


def test_trained_biases_missing_in_the_file_are_refused(tmp_path):
    case = CASES["all biases"]
    case.model().save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", lambda t: t.pop("base_model.model.transformer.ln_f.bias"))
    refuse(case.base(), tmp_path / "a", ValueError, r"transformer\.ln_f\.bias.* is missing")


def test_modules_to_save_missing_in_the_file_are_refused(tmp_path):
    case = CASES["head in full"]
    case.model().save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", lambda t: t.pop("base_model.model.lm_head.weight"))
    refuse(case.base(), tmp_path / "a", ValueError, r"lm_head\.weight.*is missing")


def test_a_model_that_carries_an_adapter_takes_no_second_one(folder):
    model = Case({}).model()
    refuse(model, folder, ValueError, "already carries an adapter of PEFT")
    sp.from_peft(model)
    with pytest.raises(ValueError, match="already carries a Bayesian LoRA adapter"):
        sp.from_peft(model)


def test_two_active_adapters_are_refused():
    model = tiny.causal_lm()
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), name)
    model.set_adapter(["one", "two"])
    refuse(model, None, ValueError, "Exactly one LoRA adapter must be active, found .*'one', 'two'")


def test_wrong_arguments(tmp_path, folder):
    refuse(tiny.causal_lm(), None, ValueError, "carries no adapter.*bayesian_lora")
    refuse(tiny.causal_lm(), folder.parent, FileNotFoundError, "holds no adapter_config.json.*Did you mean '.*adapter'")
    refuse(tiny.causal_lm(), 3, TypeError, "path=3")
    with pytest.raises(ValueError, match="rank=4: the adapter is LoRA already"):
        sp.from_peft(tiny.causal_lm(), folder, rank=4)
    with pytest.raises(TypeError, match="spectrum"):
        sp.from_peft(tiny.causal_lm(), folder, spectrum="yes")
    with pytest.raises(TypeError, match="expected a model"):
        sp.from_peft("gpt2", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    refuse(tiny.causal_lm(), folder, ValueError, "the weights of the adapter cannot be read")
