"""The adapted layer computes y = W0 x + gamma B (s * A x), and leaves no trace when it is gone."""

import copy
import threading
from pathlib import Path

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import scalabl_pyro as sp
from scalabl_pyro.lora import attach, layer_checks


def random_factors(blora, *, seed=0):
    """Give B (zero at the start) and A values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for A, B in blora.adapter.factors():
            A.copy_(torch.randn(A.shape, generator=generator, dtype=A.dtype))
            B.copy_(torch.randn(B.shape, generator=generator, dtype=B.dtype))


def latents(blora, *batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, blora.subspace.dim, generator=generator, dtype=blora.adapter.loc.dtype)


def dense_twin(llm, blora, s):
    """A copy of the base model whose targeted weights are W0 + gamma B diag(s) A, with the gauge of the adapter."""
    twin = copy.deepcopy(llm)
    base = attach.find_adapter(twin).unload()
    for layer, module, part, (A, B) in zip(
        blora.subspace, blora.adapter.layers, blora.subspace.split(s), blora.adapter.factors(), strict=True
    ):
        if blora.adapter.gauge == "unit_rows":
            A = A / A.norm(dim=1, keepdim=True)
        delta = module.scaling[blora.adapter.adapter_name] * B @ torch.diag(part) @ A
        target = base.get_submodule(layer.name)
        weight = target.weight + (delta.T if isinstance(target, Conv1D) else delta)
        target.weight = nn.Parameter(weight.detach())  # a new one: the LM head may be tied
    return base


@pytest.mark.parametrize("gauge", ["unit_rows", "free"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3", "gemma"])
def test_factored_forward_equals_the_merged_dense_weight(family, gauge):
    llm = tiny.causal_lm(family, dtype=torch.float64)
    blora = sp.bayesian_lora(llm, gauge=gauge)
    random_factors(blora)
    s = latents(blora)
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        factored = blora(input_ids=ids, s=s).logits
        dense = dense_twin(llm, blora, s)(input_ids=ids).logits
    assert (factored - dense).abs().max() < 1e-10


def test_each_row_can_carry_its_own_draw(blora):
    random_factors(blora)
    ids = torch.arange(2, 20).view(3, 6)
    s = latents(blora, 3)
    with torch.no_grad():
        together = blora(input_ids=ids, s=s).logits
        alone = torch.cat([blora(input_ids=ids[i : i + 1], s=s[i]).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_layer_of_two_dimensional_input_can_carry_row_draws():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    blora = sp.bayesian_lora(net, r=2)
    random_factors(blora)
    x, s = torch.arange(24.0).view(4, 6), latents(blora, 4)
    together = blora(x, s=s)
    alone = torch.cat([blora(x[i : i + 1], s=s[i]) for i in range(4)])
    torch.testing.assert_close(together, alone)


def test_a_layer_that_mixes_rows_refuses_row_draws():
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Linear(6, 6)

        def forward(self, x):
            return self.experts(x.reshape(-1, 6)).view_as(x)

    blora = sp.bayesian_lora(Flattens(), r=2)
    x = torch.ones(2, 3, 6)
    blora(x, s=latents(blora))  # one draw for all rows is fine
    with pytest.raises(ValueError, match=r"'experts' received 6 rows, but the batch has 2 rows.*draws='shared'"):
        blora(x, s=latents(blora, 2))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert"])
def test_unload_gives_the_original_module_back_bit_for_bit(family):
    llm = tiny.classifier(family) if family == "bert" else tiny.causal_lm(family)
    modules = dict(llm.named_modules())
    state = {k: v.clone() for k, v in llm.state_dict().items()}
    flags = {n: p.requires_grad for n, p in llm.named_parameters()}
    attributes = set(vars(llm))
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in llm.named_modules()}
    blora = sp.bayesian_lora(llm)
    random_factors(blora)
    assert blora.unload() is llm
    assert dict(llm.named_modules()) == modules  # the same objects under the same names
    assert set(llm.state_dict()) == set(state)
    assert all(torch.equal(v, state[k]) for k, v in llm.state_dict().items())
    assert {n: p.requires_grad for n, p in llm.named_parameters()} == flags
    assert set(vars(llm)) == attributes
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in llm.named_modules()} == hooks
    sp.bayesian_lora(llm).unload()  # and again


def test_a_deep_copy_is_independent_of_the_module_it_was_copied_from(llm, blora):
    random_factors(blora)
    ids = torch.arange(2, 8).view(1, 6)
    before = blora(input_ids=ids, s=latents(blora)).logits
    twin = copy.deepcopy(llm)
    assert torch.equal(twin(ids).logits, llm(ids).logits)
    attach.find_adapter(twin).unload()
    assert set(twin.state_dict()) == set(tiny.causal_lm().state_dict())
    assert torch.equal(blora(input_ids=ids, s=latents(blora)).logits, before)


def test_disabled_is_the_base_model_and_only_inside_the_context(llm):
    ids = torch.arange(2, 8).view(1, 6)
    with torch.no_grad():
        base = llm(ids).logits
        blora = sp.bayesian_lora(llm)
        random_factors(blora)
        adapted = blora(ids, s=latents(blora)).logits
        with blora.disabled():
            assert torch.equal(llm(ids).logits, base)
        assert torch.equal(blora(ids, s=latents(blora)).logits, adapted)
    assert not torch.allclose(adapted, base)


def test_a_fresh_adapter_changes_nothing(llm):
    ids = torch.arange(2, 8).view(1, 6)
    with torch.no_grad():
        base = llm(ids).logits
        blora = sp.bayesian_lora(llm)
        assert torch.equal(blora(ids, s=latents(blora)).logits, base)
        assert torch.equal(llm(ids).logits, base)  # called directly, it rests at the initial mean


def test_initialization_is_the_papers(llm):
    blora = sp.bayesian_lora(llm, r=4)
    for (A, B), s in zip(blora.adapter.factors(), blora.subspace.split(blora.adapter.loc), strict=True):
        torch.testing.assert_close(A @ A.T, torch.eye(4))
        assert torch.count_nonzero(B) == 0
        assert (s > 0).all()
        assert (s.diff() <= 0).all()  # singular values, largest first
    same = sp.bayesian_lora(tiny.causal_lm(), r=4)
    other = sp.bayesian_lora(tiny.causal_lm(), r=4, seed=1)
    assert torch.equal(same.adapter.loc, blora.adapter.loc)
    assert not torch.equal(other.adapter.loc, blora.adapter.loc)


@pytest.mark.parametrize(
    ("config", "lora", "extra"),
    [
        ("qwen2.5-7b", 3_768_320, 912),
        ("qwen2.5-32b", 9_646_080, 2_064),
        ("llama-2-7b", 4_483_072, 1_040),
        ("llama-3.1-8b", 4_466_688, 1_040),
    ],
)
def test_parameter_counts_are_the_published_ones(config, lora, extra):
    shapes = {
        "qwen2.5-7b": ("qwen2", 152_064, 3584, 28, 28, 4),
        "qwen2.5-32b": ("qwen2", 152_064, 5120, 64, 40, 8),
        "llama-2-7b": ("llama", 32_000, 4096, 32, 32, 32),
        "llama-3.1-8b": ("llama", 128_256, 4096, 32, 32, 8),
    }
    family, vocabulary, hidden, layers, heads, kv_heads = shapes[config]
    settings = AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=128,  # not adapted, and never allocated
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(settings)
    counts = sp.bayesian_lora(llm).num_parameters()
    assert (counts["lora"], counts["variational"]) == (lora, extra)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_stay_half_and_factors_float32(dtype):
    llm = tiny.causal_lm(dtype=dtype)
    blora = sp.bayesian_lora(llm)
    random_factors(blora)
    seen = []
    layer = llm.model.layers[0].self_attn.v_proj
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    logits = blora(input_ids=torch.arange(2, 8).view(1, 6), s=latents(blora)).logits
    assert seen == [(dtype, dtype)]
    assert logits.dtype == dtype
    assert all(f.dtype == torch.float32 for pair in blora.adapter.factors() for f in pair)
    assert blora.adapter.loc.dtype == torch.float32
    logits.float().sum().backward()
    assert all(f.grad.dtype == torch.float32 for pair in blora.adapter.factors() for f in pair)


@pytest.fixture
def lora_model(llm):
    """A PEFT model whose LoRA has been trained away from its start."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    model = get_peft_model(llm, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_an_existing_lora_keeps_its_function_and_gets_orthonormal_rows(lora_model):
    ids = torch.arange(2, 8).view(1, 6)
    with torch.no_grad():
        before = lora_model(input_ids=ids).logits
        blora = sp.bayesian_lora(lora_model)
        torch.testing.assert_close(blora(input_ids=ids, s=blora.adapter.loc).logits, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lora_model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    assert blora.subspace.ranks == [3, 2, 3, 2]
    for A, _ in blora.adapter.factors():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=1e-5, atol=1e-5)


def test_unloading_from_an_existing_lora_gives_that_lora_back(lora_model):
    ids = torch.arange(2, 8).view(1, 6)
    state = {k: v.clone() for k, v in lora_model.state_dict().items()}
    before = lora_model(input_ids=ids).logits
    blora = sp.bayesian_lora(lora_model)
    assert blora.unload() is lora_model
    assert all(torch.equal(v, state[k]) for k, v in lora_model.state_dict().items())
    assert torch.equal(lora_model(input_ids=ids).logits, before)


def test_an_untrained_lora_can_become_bayesian(llm):
    model = get_peft_model(llm, LoraConfig(r=4, target_modules=["q_proj"]))
    blora = sp.bayesian_lora(model)
    assert all(torch.isfinite(f).all() for pair in blora.adapter.factors() for f in pair)
    assert all(torch.count_nonzero(B) == 0 for _, B in blora.adapter.factors())


def test_options_that_an_existing_lora_decides_are_refused(lora_model):
    with pytest.raises(ValueError, match="already carries PEFT LoRA layers, which decide r, target_modules"):
        sp.bayesian_lora(lora_model, r=8, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "only plain LoRA"),
        (peft.VeraConfig(r=2, target_modules=["o_proj"]), "another PEFT method"),
    ],
)
def test_other_adapters_are_refused_and_left_alone(llm, config, message):
    model = get_peft_model(llm, config)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        sp.bayesian_lora(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_wrapping_twice_is_refused(llm, blora):
    with pytest.raises(ValueError, match=r"already carries a Bayesian LoRA adapter.*unload"):
        sp.bayesian_lora(llm)


def test_merging_is_refused(blora):
    with pytest.raises(RuntimeError, match="cannot be merged"):
        blora.adapter.layers[0].merge()


def test_layers_that_would_ignore_the_latents_are_refused(monkeypatch, llm):
    """PEFT's AWQ, AQLM, EETQ, INC and Megatron layers never ask the variant."""
    monkeypatch.setattr(layer_checks, "SUPPORTED_LAYERS", ("Linear4bit",))
    modules = dict(llm.named_modules())
    with pytest.raises(TypeError, match="is a PEFT Linear, which would ignore the latents silently"):
        sp.bayesian_lora(llm)
    assert dict(llm.named_modules()) == modules
    assert all(p.requires_grad for p in llm.parameters())


@pytest.mark.parametrize("file", ["layer", "bnb", "gptq", "hqq"])
def test_peft_still_asks_the_variant_in_the_supported_layers(file):
    """The list of supported layers is about PEFT's code: a release that stops asking must fail here."""
    source = Path(peft.__file__).parent / "tuners" / "lora" / f"{file}.py"
    assert "self.lora_variant[active_adapter].forward(" in source.read_text(encoding="utf-8")


def test_draws_in_two_contexts_do_not_mix(blora):
    """What a pass computes with is bound to the context, so threads may use one module with different draws."""
    random_factors(blora)
    ids = torch.arange(2, 8).view(1, 6)
    draws = [latents(blora, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [blora(input_ids=ids, s=s).logits for s in draws]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(blora(input_ids=ids, s=draws[i]).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
