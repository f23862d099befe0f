"""Models with the shapes of real LLMs and random weights, for benchmarks of time and memory."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from scalabl_pyro.lora.float8 import Float8Linear

QWEN = {"model_type": "qwen2", "vocab_size": 152_064}
SHAPES = {
    "tiny": {"model_type": "qwen2", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "qwen2.5-0.5b": QWEN | {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
                            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    "qwen2.5-1.5b": QWEN | {"vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960,
                            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "qwen2.5-7b": QWEN | {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                          "num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen2.5-14b": QWEN | {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48,
                           "num_attention_heads": 40, "num_key_value_heads": 8},
    "qwen2.5-32b": QWEN | {"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64,
                           "num_attention_heads": 40, "num_key_value_heads": 8},
    "qwen2.5-72b": QWEN | {"hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80,
                           "num_attention_heads": 64, "num_key_value_heads": 8},
}  # fmt: skip


def random_llm(
    shape: str, device: str, dtype: torch.dtype, *, storage: str | None = None, blocks: int | None = None
) -> nn.Module:
    """Make a causal LM with random weights.

    Args:
        shape: Key of ``SHAPES``.
        device: Device of the model.
        dtype: Type of the weights.
        storage: How the linear layers of the blocks are stored, a key of ``STORAGES``; None means in ``dtype``.
        blocks: Number of blocks; None means that of the shape.
    """
    config = _config(shape, blocks or SHAPES[shape]["num_hidden_layers"])
    with torch.device(device):
        if storage is None:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        # Blocks are converted one by one, because the whole model in 16 bits may not fit.
        llm = AutoModelForCausalLM.from_config(_config(shape, 1), dtype=dtype)
        block = type(llm.model.layers[0])
        config._attn_implementation = llm.config._attn_implementation
        llm.model.layers = nn.ModuleList(
            _converted(block(config, i).to(dtype), STORAGES[storage]) for i in range(config.num_hidden_layers)
        )
    llm.config = llm.model.config = config
    return llm.requires_grad_(False).eval()


def num_weights(shape: str, *, embeddings: bool) -> int:
    """Count the weights of a shape without allocating them.

    Args:
        shape: Key of ``SHAPES``.
        embeddings: Whether embeddings and LM head count too; else only the blocks do.
    """
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(_config(shape, SHAPES[shape]["num_hidden_layers"]))
    total = sum(p.numel() for p in llm.parameters())
    return total if embeddings else total - 2 * llm.get_input_embeddings().weight.numel()


def fuse_elementwise(llm: nn.Module) -> nn.Module:
    """Install Liger's Triton kernels for norms, rotations and gates in a Llama or Qwen2 model, before it is adapted.

    Returns:
        The model itself.
    """
    from liger_kernel import transformers as kernels

    apply = {"llama": kernels.apply_liger_kernel_to_llama, "qwen2": kernels.apply_liger_kernel_to_qwen2}
    if (kind := llm.config.model_type) not in apply:
        raise SystemExit(f"--liger supports {' and '.join(apply)} models, but this one is {kind!r}: leave --liger out.")
    apply[kind](fused_linear_cross_entropy=False, model=llm)
    return llm


def _config(shape: str, blocks: int):
    settings = SHAPES[shape] | {"num_hidden_layers": blocks}
    kind = settings.pop("model_type")
    return AutoConfig.for_model(kind, tie_word_embeddings=False, pad_token_id=0, **settings)


def _converted(block: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace the linear layers of a block."""
    for module in list(block.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, convert(layer))
    return block


def _in_four_bits(layer: nn.Linear) -> nn.Module:
    """Make a layer of bitsandbytes, which stores the weight in NF4."""
    import bitsandbytes as bnb

    weight, bias = layer.weight, layer.bias
    with torch.device("meta"):
        small = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
        )
    codes = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=small)
    small.weight = codes.to(weight.device)  # Moving to the device quantizes.
    small.bias = bias
    return small


#: What makes a stored layer. Layers in 8-bit floats do not keep the weight in 16 bits in the memory of the host.
STORAGES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "4bit": _in_four_bits,
    "float8": functools.partial(Float8Linear, keep_original=False),
    "float8-compact": functools.partial(Float8Linear, keep_original=False, keep_transposed=False),
}
