"""Adapters of PEFT of all kinds, with values as if they had been trained."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import scalabl_pyro as sp

IDS = torch.arange(2, 10)[None]
QUESTIONS, TEXTS = tiny.question_rows(6), tiny.text_rows(6)


def choose() -> sp.Task:
    return sp.MultipleChoice(tiny.tokenizer())


def classify() -> sp.Task:
    return sp.SequenceClassification(tiny.tokenizer(), classes=["a", "b", "c"])


def gemma() -> nn.Module:
    return tiny.causal_lm("gemma", vocab_size=64)


def tied() -> nn.Module:
    return tiny.causal_lm("llama-tied")


def roberta() -> nn.Module:
    config = tf.RobertaConfig(**tiny.CONFIGS["bert"]().to_diff_dict() | {"num_labels": 3})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.RobertaForSequenceClassification(config).eval()


@dataclass(frozen=True)
class Case:
    """An adapter of PEFT, and the names of the tensors that are saved because of it."""

    options: dict[str, Any]
    saved: set[str] = field(default_factory=set)
    base: Callable[[], nn.Module] = tiny.causal_lm
    wrap: Callable[[nn.Module, LoraConfig], nn.Module] = get_peft_model
    task: Callable[[], sp.Task] = choose
    heads: set[str] = field(default_factory=set)

    @property
    def rows(self) -> list[dict]:
        return QUESTIONS if self.task is choose else TEXTS

    def model(self) -> nn.Module:
        """The base with the adapter, of which everything that PEFT trains has other values than before."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.wrap(self.base(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **self.options})).eval()
            trained = [p for p in model.parameters() if p.requires_grad]
            for p in trained:
                p.data += 0.2 * torch.randn_like(p)
        return model


def add_to_base(model: nn.Module, config: LoraConfig) -> nn.Module:
    model.add_adapter(config)
    return model


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
BOTH = ["q_proj", "embed_tokens", "lm_head"]
BIASES = {f"transformer.h.{i}.{n}.bias" for i in (0, 1) for n in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj")}
BIASES |= {f"transformer.h.{i}.mlp.{n}.bias" for i in (0, 1) for n in ("c_fc", "c_proj")} | {"transformer.ln_f.bias"}
NORMS = {f"model.layers.{i}.post_attention_layernorm.weight" for i in (0, 1)}
GPT2 = {"base": lambda: tiny.causal_lm("gpt2"), "saved": BIASES}

CASES = {
    "plain": Case({}),
    "head in full": Case({"modules_to_save": ["lm_head"]}, {HEAD}),
    "embeddings in full": Case({"modules_to_save": ["embed_tokens"]}, {EMBED}, tied),
    "both in full": Case({"modules_to_save": ["embed_tokens", "lm_head"]}, {EMBED, HEAD}),
    "norms in full": Case({"modules_to_save": ["post_attention_layernorm"]}, NORMS),
    "all biases": Case({"bias": "all", "target_modules": ["c_attn"]}, **GPT2),
    "biases of LoRA": Case({"bias": "lora_only", "target_modules": ["c_attn"]}, **GPT2),
    "LoRA on embeddings": Case({"target_modules": ["q_proj", "embed_tokens"]}, {EMBED}),
    "LoRA on scaled embeddings": Case({"target_modules": ["q_proj", "embed_tokens"]}, {EMBED}, gemma),
    "LoRA on tied embeddings": Case({"target_modules": ["q_proj", "embed_tokens"]}, {EMBED}, tied),
    "LoRA on both, untied": Case({"target_modules": BOTH}, {EMBED}),
    "LoRA on both, tied weights": Case({"target_modules": BOTH}, {EMBED}, tied),
    "LoRA on both, tied factors": Case({"target_modules": BOTH, "ensure_weight_tying": True}, {EMBED}, tied),
    "LoRA on a tied head": Case({"target_modules": ["q_proj", "lm_head"]}, base=tied),
    "tokens": Case({"trainable_token_indices": [3, 4]}, {EMBED}),
    "tokens of tied embeddings": Case({"trainable_token_indices": [3, 4]}, {EMBED, HEAD}, tied),
    "PiSSA": Case({"init_lora_weights": "pissa"}, Q_PROJ),
    "OLoRA": Case({"init_lora_weights": "olora"}, Q_PROJ),
    "own head": Case({"task_type": "SEQ_CLS"}, base=tiny.classifier, task=classify, heads={"score"}),
    "part of the head": Case(
        {"target_modules": ["query"], "modules_to_save": ["out_proj"]},
        base=roberta,
        task=classify,
        heads={"classifier"},
    ),
    "LoRA in the head": Case(
        {"target_modules": ["query", "out_proj"]},
        {f"classifier.{n}.{k}" for n in ("dense", "out_proj") for k in ("weight", "bias")},
        roberta,
        task=classify,
    ),
    "add_adapter": Case({"target_modules": ["q_proj", "embed_tokens"]}, {EMBED}, wrap=add_to_base),
    "LoraModel": Case({"modules_to_save": ["lm_head"]}, {HEAD}, wrap=lambda m, c: get_peft_model(m, c).base_model),
    "mixed": Case({"modules_to_save": ["lm_head"]}, {HEAD}, wrap=lambda m, c: get_peft_model(m, c, mixed=True)),
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def everything(model: nn.Module) -> dict[str, Any]:
    """Values and flags of all parameters, which of them share memory, and the attributes of all modules."""
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": {n: p.requires_grad for n, p in named},
        "memory": {n: (id(p), p.data_ptr()) for n, p in named},
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
    }


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["values"].keys() == b["values"].keys()
    assert all(torch.equal(t, b["values"][n]) for n, t in a["values"].items())
    assert {k: v for k, v in a.items() if k != "values"} == {k: v for k, v in b.items() if k != "values"}
