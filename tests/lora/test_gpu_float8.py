"""Layers in 8-bit floats on a GPU that multiplies them: equal to the emulation of the CPU, captured, and small."""

import copy
import gc

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro.lora import float8_rows
from scalabl_pyro.lora.float8 import Float8Linear, float8_layers
from scalabl_pyro.lora.float8_rows import FLOAT8, quantize_rows, quantize_rows_plainly, transpose

pytestmark = pytest.mark.gpu
ROWS = tiny.question_rows(24)


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply 8-bit floats")


def bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8).cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (300, 3584), (5, 18_944), (3, 29_568)])
@pytest.mark.parametrize("with_columns", [False, True])
def test_the_kernel_gives_the_bits_of_the_plain_path_and_of_the_cpu(dtype, shape, with_columns):
    assert float8_rows.triton_kernels() is not None, "Triton is not installed"
    sizes = torch.logspace(-4, 3, shape[0]).unsqueeze(1)
    matrix = (torch.randn(shape) * sizes).to(dtype).cuda()
    matrix[0, :8] = 0
    if shape[0] > 2:
        matrix[1] = 0
        matrix[2, 1:] = 0
    columns = torch.rand(shape[1], device="cuda") * 1e-3 if with_columns else None
    codes, scales = quantize_rows(matrix, columns)
    plain_codes, plain_scales = quantize_rows_plainly(matrix, columns)
    cpu_codes, cpu_scales = quantize_rows(matrix.cpu(), None if columns is None else columns.cpu())
    assert torch.equal(scales, plain_scales) and torch.equal(scales.cpu(), cpu_scales)
    # 0x80 is -0: the sign of zero has no effect on a product.
    found, *others = (bits(c).where(bits(c) != 0x80, 0) for c in (codes, plain_codes, cpu_codes))
    assert all(torch.equal(found, other) for other in others)


def test_the_kernel_reads_rows_that_lie_apart():
    matrix = torch.randn(6, 96, device="cuda", dtype=torch.bfloat16)
    for part in (matrix[:, :48], matrix[::2], matrix[:, ::2], matrix.t()):
        codes, scales = quantize_rows(part)
        expected, expected_scales = quantize_rows_plainly(part)
        assert torch.equal(bits(codes), bits(expected)) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("shape", [(16, 16), (176, 304), (3584, 18_944)])
def test_the_kernel_transposes(shape):
    codes = torch.randint(0, 255, shape, dtype=torch.uint8, device="cuda").view(FLOAT8)
    assert torch.equal(bits(transpose(codes)), bits(codes).t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("keep_transposed", [True, False])
def test_products_are_those_of_the_emulation_up_to_the_rounding_of_sums(dtype, bias, rows, keep_transposed):
    linear = nn.Linear(3584, 512, bias=bias).to(dtype)
    on_cpu = Float8Linear(linear, keep_transposed=keep_transposed)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, g = torch.randn(rows, 3584).to(dtype), torch.randn(rows, 512).to(dtype)
    results = []
    for layer, device in ((on_cpu, "cpu"), (on_gpu, "cuda")):
        own = x.to(device).requires_grad_(True)
        y = layer(own)
        (gradient,) = torch.autograd.grad(y, own, g.to(device))
        assert y.dtype == gradient.dtype == dtype
        results.append((y.detach().cpu().float(), gradient.cpu().float()))
    for found, expected in zip(results[1], results[0], strict=True):
        # Tensor cores sum with fewer bits than float32, and the result is rounded to bfloat16.
        assert (found - expected).norm() < 4e-3 * expected.norm()


def test_a_weight_converted_on_the_gpu_has_the_bits_of_the_cpu():
    linear = nn.Linear(512, 2048).bfloat16()
    one, other = Float8Linear(linear), Float8Linear(copy.deepcopy(linear).cuda())
    for name in ("codes", "bits", "transposed"):
        assert torch.equal(getattr(one, name), getattr(other, name).cpu()), name


def fitted(word="float8", **hardware):
    llm = tiny.causal_lm().bfloat16().cuda()
    blora = sp.bayesian_lora(llm, r=4, base_precision=word)
    options = {"num_steps": 25, "batch_size": 6, "lr": 1e-2, "lr_A": 1e-2, "progress": False, "hardware": hardware}
    return llm, sp.fit(blora, sp.MultipleChoice(tiny.tokenizer()), ROWS, **options)


@pytest.mark.parametrize("word", ["float8", "float8-compact"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_steps_have_the_losses_of_eager_ones(word, checkpointing, caplog):
    _, eager = fitted(word, cuda_graph=False, gradient_checkpointing=checkpointing)
    _, graphed = fitted(word, cuda_graph="auto", gradient_checkpointing=checkpointing)
    assert "without CUDA graphs" not in caplog.text, caplog.text
    for name in ("loss", "nll", "kl", "grad_norm"):
        np.testing.assert_allclose(graphed.history[name], eager.history[name], rtol=1e-2, atol=1e-3, err_msg=name)


def test_a_posterior_is_saved_loaded_and_unloaded(tmp_path):
    _, result = fitted()
    expected = result.posterior.predict(ROWS, num_draws=4, seed=0).log_probs
    assert expected.std(0).min() > 0
    result.posterior.save_pretrained(tmp_path)
    again = tiny.causal_lm().bfloat16().cuda()
    before = {k: v.clone() for k, v in again.state_dict().items()}
    loaded = sp.Posterior.from_pretrained(again, tmp_path)
    assert all(not layer.original.weight.is_cuda for layer in float8_layers(again))
    np.testing.assert_array_equal(loaded.predict(ROWS, num_draws=4, seed=0).log_probs, expected)
    loaded.export_peft(tmp_path / "export", draws=2)
    loaded.merge(1)
    loaded.adapter.unload()
    for key, value in again.state_dict().items():
        assert value.is_cuda and torch.equal(value, before[key]), key


def test_an_error_after_the_conversion_brings_the_weights_back(monkeypatch):
    llm = tiny.causal_lm().bfloat16().cuda()
    monkeypatch.setattr("scalabl_pyro.model.bayesian_lora.convert", _convert_and_fail)
    with pytest.raises(KeyboardInterrupt):
        sp.bayesian_lora(llm, r=4, base_precision="float8")
    assert all(p.is_cuda for p in llm.parameters()) and not float8_layers(llm)
    assert torch.isfinite(llm(torch.arange(2, 8, device="cuda").view(1, 6)).logits).all()


def _convert_and_fail(adapter, base_precision):
    from scalabl_pyro.lora.float8_convert import convert

    convert(adapter, base_precision)
    raise KeyboardInterrupt


def test_a_model_that_was_converted_on_the_cpu_can_be_moved():
    llm = tiny.causal_lm().bfloat16()
    blora = sp.bayesian_lora(llm, r=4, base_precision="float8").cuda()
    ids = torch.arange(2, 8, device="cuda").view(1, 6)
    with torch.no_grad():
        moved = llm(ids).logits
        other = tiny.causal_lm().bfloat16().cuda()
        sp.bayesian_lora(other, r=4, base_precision="float8")
        assert torch.equal(other(ids).logits, moved)
    assert all(layer.codes.is_cuda and not layer.original.weight.is_cuda for layer in float8_layers(llm))
    assert all(p.is_cuda for p in blora.unload().parameters())


@pytest.mark.parametrize(("word", "share"), [("float8", 1.0), ("float8-compact", 0.5)])
def test_weights_of_the_blocks_take_as_much_memory_as_in_bfloat16_or_half(word, share):
    def weights(base_precision):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        with torch.device("cuda"):
            llm = tiny.causal_lm(hidden_size=1024, intermediate_size=4096, head_dim=256, dtype=torch.bfloat16)
        in_blocks = sum(m.weight.numel() for m in llm.model.layers.modules() if type(m) is nn.Linear)
        blora = sp.bayesian_lora(llm, r=4, base_precision=base_precision)
        estimate = blora.estimate_memory({"input_ids": torch.ones(2, 8, dtype=torch.long, device="cuda")}).weights
        gc.collect()
        return torch.cuda.memory_allocated() - before, estimate, in_blocks

    exact, exact_estimate, in_blocks = weights("original")
    found, estimate, _ = weights(word)
    for one, other in ((found, exact), (estimate, exact_estimate)):
        assert other - one == pytest.approx(2 * in_blocks * (1 - share), abs=0.01 * 2 * in_blocks)
