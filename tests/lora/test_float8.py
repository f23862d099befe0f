"""Frozen layers in 8-bit floats: their products, which layers are converted, and the way back."""

import copy
import logging
import re

import pytest
import tiny
import torch
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro.lora import float8_device, float8_inputs
from scalabl_pyro.lora.fingerprint import fingerprint
from scalabl_pyro.lora.float8 import Float8Linear, precision_of
from scalabl_pyro.lora.float8_rows import quantize_rows

WORDS = ["float8", "float8-compact"]


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """The values of quantized rows, by hand in float64: 4 significant bits, at least multiples of 2^-9, up to 448."""
    scale = matrix.abs().amax(1, keepdim=True).double() / 448
    x = matrix.double() / scale
    exponent = x.abs().clamp_min(2.0**-6).log2().floor()
    step = 2 ** (exponent - 3)
    return (x / step).round() * step * scale


def layers_of(module: nn.Module) -> dict[str, Float8Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, Float8Linear)}


def test_rows_become_the_nearest_8_bit_floats_after_scaling_by_their_largest_number():
    matrix = torch.randn(40, 96) * torch.logspace(-12, 6, 40)[:, None]
    codes, scales = quantize_rows(matrix)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (40, 1) and scales.dtype == torch.float32
    torch.testing.assert_close(codes.double() * scales.double(), rounded(matrix), rtol=1e-6, atol=0)
    assert torch.equal(codes.float().abs().amax(1), torch.full((40,), 448.0))


def test_rows_of_zeros_and_of_tiny_numbers_are_safe():
    matrix = torch.zeros(4, 16)
    matrix[1], matrix[2, 3], matrix[3] = 1e-44, -3e-12, 1e38
    codes, scales = quantize_rows(matrix)
    back = codes.float() * scales
    assert torch.isfinite(back).all() and (scales > 0).all()
    assert not back[0].any() and not back[1].any()
    torch.testing.assert_close(back[2:], matrix[2:], rtol=1e-6, atol=0)


def test_a_row_that_is_not_finite_gives_a_row_that_is_not_finite():
    matrix = torch.randn(3, 16)
    matrix[1, 2] = float("nan")
    matrix[2, 2] = float("inf")
    back = (lambda pair: pair[0].float() * pair[1])(quantize_rows(matrix))
    assert torch.isfinite(back[0]).all() and back[1].isnan().any() and back[2].isnan().any()


@pytest.mark.parametrize("keep_transposed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_the_products_of_the_rounded_numbers(bias, keep_transposed):
    linear = nn.Linear(48, 80, bias=bias)
    layer = Float8Linear(linear, keep_transposed=keep_transposed)
    x = torch.randn(3, 5, 48, requires_grad=True)
    y = layer(x)
    W, rows = rounded(linear.weight.detach()), rounded(x.detach().view(15, 48))
    expected = rows @ W.T + (linear.bias.detach().double() if bias else 0)
    torch.testing.assert_close(y.detach().double().view(15, 80), expected, rtol=1e-5, atol=1e-6)
    g = torch.randn(3, 5, 80)
    g[0, 0] = 0
    (found,) = torch.autograd.grad(y, x, g)
    w = linear.weight.detach().abs().amax(1) / 448
    C = W / w.double()[:, None]
    expected = rounded(g.view(15, 80).clone()[1:] * w) @ C  # a row of zeros has no scale here
    torch.testing.assert_close(found.double().view(15, 48)[1:], expected, rtol=1e-5, atol=1e-6)
    assert not found[0, 0].any()


def test_one_product_of_normal_numbers_is_off_by_a_few_percent():
    linear = nn.Linear(1024, 256, bias=False)
    nn.init.normal_(linear.weight)
    x = torch.randn(64, 1024, requires_grad=True)
    layer = Float8Linear(linear)
    g = torch.randn(64, 256)
    pairs = [(layer(x), linear(x)), tuple(torch.autograd.grad(f(x), x, g)[0] for f in (layer, linear))]
    for found, exact in pairs:
        assert 0.02 < ((found - exact).norm() / exact.norm()).item() < 0.05


def test_an_input_without_rows_passes_in_both_directions():
    x = torch.empty(0, 16, requires_grad=True)
    y = Float8Linear(nn.Linear(16, 32))(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (0, 32) and gradient.shape == (0, 16)


def test_layers_that_read_one_input_convert_it_once_and_a_change_in_place_is_seen(monkeypatch):
    converted = []
    convert = float8_inputs.quantize_rows
    monkeypatch.setattr(float8_inputs, "quantize_rows", lambda x: converted.append(x) or convert(x))
    layers = [Float8Linear(nn.Linear(16, 32, bias=False)) for _ in range(3)]
    x = torch.randn(2, 16)
    first = [layer(x) for layer in layers]
    assert len(converted) == 1
    x.mul_(-2)
    assert torch.equal(layers[0](x), -2 * first[0])
    assert len(converted) == 2
    layers[1](x.clone())
    assert len(converted) == 3
    with torch.inference_mode():
        inner = torch.randn(2, 16)
        layers[0](inner), layers[1](inner)
    assert len(converted) == 5


def test_the_codes_of_an_input_are_freed_with_it():
    x = torch.randn(2, 16)
    Float8Linear(nn.Linear(16, 32))(x)
    assert float8_inputs._LAST
    del x
    assert not float8_inputs._LAST


def test_half_precision_comes_back_in_the_dtype_of_the_input():
    layer = Float8Linear(nn.Linear(16, 32).bfloat16())
    x = torch.randn(2, 16, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == gradient.dtype == layer.dtype == layer.weight.dtype == torch.bfloat16


def test_a_cast_leaves_codes_and_scales_alone():
    layer = Float8Linear(nn.Linear(16, 32))
    codes, scales = layer.codes.clone(), layer.scales.clone()
    layer.bfloat16()
    assert torch.equal(layer.codes, codes) and torch.equal(layer.scales, scales)
    assert layer.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.restored().weight.dtype == torch.bfloat16


def test_the_weight_can_be_read():
    linear = nn.Linear(16, 32)
    torch.testing.assert_close(Float8Linear(linear).weight.double(), rounded(linear.weight.detach()), rtol=1e-6, atol=0)


def test_all_linear_layers_of_the_blocks_are_converted_and_the_head_is_not(caplog):
    llm = tiny.causal_lm("qwen2")
    with caplog.at_level(logging.INFO, logger="scalabl_pyro.lora.float8_convert"):
        blora = sp.bayesian_lora(llm, r=4, base_precision="float8")
    assert len(layers_of(llm)) == 2 * 7
    assert all(name.startswith("model.layers.") for name in layers_of(llm))
    assert all(isinstance(layer.get_base_layer(), Float8Linear) for layer in blora.adapter.layers[:-1])
    assert type(blora.adapter.layers[-1].get_base_layer()) is nn.Linear  # the head
    assert "14 linear layers of the blocks compute in 8-bit floats, 0 stay as they are" in caplog.text


def test_layers_of_other_sizes_and_with_hooks_stay_and_are_counted(caplog):
    llm = tiny.causal_lm(intermediate_size=40)
    llm.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *args: None)
    llm.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *args: None)
    with caplog.at_level(logging.INFO, logger="scalabl_pyro.lora.float8_convert"):
        sp.bayesian_lora(llm, r=4, base_precision="float8")
    assert {name.split(".")[4] for name in layers_of(llm)} == {"q_proj", "k_proj", "v_proj"}
    assert "6 linear layers of the blocks" in caplog.text
    assert "8 stay as they are: 2 o_proj, 2 gate_proj, 2 up_proj, 2 down_proj" in caplog.text


def test_trained_heads_stay_in_their_precision():
    llm = tiny.classifier("bert")
    sp.bayesian_lora(llm, r=4, base_precision="float8", modules_to_save=["classifier", "bert.encoder.layer.1.output"])
    names = layers_of(llm)
    assert names and not any("layer.1.output" in name and "attention" not in name for name in names)


@pytest.mark.parametrize("word", WORDS)
def test_unload_gives_the_original_back_bit_for_bit(word):
    llm = tiny.causal_lm("qwen2", dtype=torch.bfloat16)
    modules, state = dict(llm.named_modules()), {k: v.clone() for k, v in llm.state_dict().items()}
    flags = [p.requires_grad for p in llm.parameters()]
    blora = sp.bayesian_lora(llm, r=4, base_precision=word)
    assert precision_of(llm) == word
    assert blora.unload() is llm
    assert dict(llm.named_modules()) == modules and precision_of(llm) == "original"
    assert llm.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in llm.state_dict().items())
    assert [p.requires_grad for p in llm.parameters()] == flags


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    llm = tiny.causal_lm()
    modules = dict(llm.named_modules())
    made = []

    def fail(self, linear, **options):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(linear)
        original(self, linear, **options)

    original = Float8Linear.__init__
    monkeypatch.setattr(Float8Linear, "__init__", fail)
    with pytest.raises(KeyboardInterrupt):
        sp.bayesian_lora(llm, r=4, base_precision="float8")
    assert len(made) == 3 and dict(llm.named_modules()) == modules


def test_an_adopted_peft_adapter_is_converted_and_given_back():
    import peft

    llm = peft.get_peft_model(tiny.causal_lm(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    before = dict(llm.named_modules())
    blora = sp.bayesian_lora(llm, base_precision="float8")
    assert len(layers_of(llm)) == 14
    assert blora.unload() is llm
    assert dict(llm.named_modules()) == before


def test_disabled_is_the_base_in_8_bit_floats_and_a_copy_computes_the_same():
    llm, ids = tiny.causal_lm(), torch.arange(2, 14).view(2, 6)
    exact = llm(ids).logits
    blora = sp.bayesian_lora(llm, r=4, base_precision="float8")
    with blora.disabled(), torch.no_grad():
        found = llm(ids).logits
    assert 0 < ((found - exact).norm() / exact.norm()).item() < 0.1
    copied = copy.deepcopy(llm)
    assert torch.equal(copied(ids).logits, llm(ids).logits)
    assert layers_of(copied)["model.layers.0.mlp.up_proj"].original is not llm.model.layers[0].mlp.up_proj.original


def test_the_fingerprint_is_that_of_the_original_weights():
    for make in (tiny.causal_lm, lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))):
        torch.manual_seed(0)
        plain = fingerprint(sp.bayesian_lora(make(), r=4).adapter)
        torch.manual_seed(0)
        assert fingerprint(sp.bayesian_lora(make(), r=4, base_precision="float8").adapter) == plain


def test_memory_counts_codes_in_one_or_two_layouts():
    weights = {}
    for word in ("original", *WORDS):
        llm = tiny.causal_lm(hidden_size=64, intermediate_size=96, head_dim=16)
        in_blocks = sum(m.weight.numel() for n, m in llm.named_modules() if "layers." in n and type(m) is nn.Linear)
        blora = sp.bayesian_lora(llm, r=4, base_precision=word)
        weights[word] = blora.estimate_memory({"input_ids": torch.ones(2, 8, dtype=torch.long)}).weights
    # On a CPU the original weights lie in the same memory.
    beside = {word: weights[word] - weights["original"] for word in WORDS}
    assert beside["float8"] - beside["float8-compact"] == in_blocks
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 96 + 64) * 4  # a scale per row
    columns = 2 * (6 * 64 + 96) * 4
    assert beside["float8-compact"] == in_blocks + rows + columns


class TestRefusals:
    def refused(self, message: str, llm: nn.Module, **options) -> None:
        before = dict(llm.named_modules())
        with pytest.raises(ValueError, match=re.escape(message)):
            sp.bayesian_lora(llm, **{"r": 4, "base_precision": "float8", **options})
        assert dict(llm.named_modules()) == before

    def test_a_wrong_word(self):
        self.refused("base_precision='fp8'", tiny.causal_lm(), base_precision="fp8")
        self.refused("Did you mean 'float8'", tiny.causal_lm(), base_precision="float_8")
        self.refused("base_precision=None", tiny.causal_lm(), base_precision=None)

    def test_float64(self):
        self.refused(
            "base_precision='float8': the weight of 'model.layers.0.self_attn.q_proj' is float64, of which 8 bits "
            "would keep little. Load the model in bfloat16, or leave base_precision out.",
            tiny.causal_lm(dtype=torch.float64),
        )

    def test_a_quantized_base(self):
        llm = tiny.causal_lm()
        layer = llm.model.layers[1].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        self.refused(
            "the weight of 'model.layers.1.mlp.up_proj' is quantized already, as torch.float8_e4m3fn. Load the model "
            "in bfloat16, or leave base_precision out.",
            llm,
        )

    def test_a_converted_base(self):
        llm = tiny.causal_lm()
        llm.model.layers[0].mlp.up_proj = Float8Linear(llm.model.layers[0].mlp.up_proj)
        self.refused("'model.layers.0.mlp.up_proj' computes in 8-bit floats already", llm)

    def test_a_model_without_such_layers(self):
        self.refused("no layer can be converted", tiny.causal_lm("gpt2"))
        self.refused("no layer can be converted", nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)))

    def test_a_device_without_8_bit_floats(self, monkeypatch):
        float8_device.check_device.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        expected = "compute capability 8.9 or higher (L4, RTX 40, H100 or newer), and NVIDIA A100 has 8.0. Leave"
        with pytest.raises(ValueError, match=re.escape(expected)):
            float8_device.check_device(torch.device("cuda:0"))
        with pytest.raises(ValueError, match="the model is on a device of type 'mps'"):
            float8_device.check_device(torch.device("mps"))
        float8_device.check_device.cache_clear()
