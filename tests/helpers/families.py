"""Tiny random models of many Hugging Face families, among them those that do something unusual."""

import tiny
import torch
import transformers as tf
from torch import nn

_VOCABULARY = len(tiny.VOCABULARY)
_WIDTH = {"vocab_size": _VOCABULARY, "hidden_size": 32, "pad_token_id": 0}
_SHAPE = {**_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_SHAPE, "intermediate_size": 48}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 128}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_LATENT_ATTENTION = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_XLM = {"vocab_size": _VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0}

CAUSAL = {
    "bloom": lambda: tf.BloomConfig(vocab_size=_VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**{**_DECODER, **_EXPERTS, **_LATENT_ATTENTION, **_GROUPS}),
    "falcon": lambda: tf.FalconConfig(**_SHAPE),
    "glm4_moe": lambda: tf.Glm4MoeConfig(**_DECODER, **_EXPERTS, **_GROUPS, head_dim=8),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_ENCODER),
    "gptj": lambda: tf.GPTJConfig(
        vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, pad_token_id=0, eos_token_id=1
    ),
    "mamba": lambda: tf.MambaConfig(**_WIDTH, num_hidden_layers=2, state_size=4),
    "mamba2": lambda: tf.Mamba2Config(
        **_WIDTH, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=8
    ),
    "mpt": lambda: tf.MptConfig(vocab_size=_VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "opt": lambda: tf.OPTConfig(
        **_SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, bos_token_id=1, eos_token_id=1
    ),
    "phi": lambda: tf.PhiConfig(**_DECODER),
    "phi3": lambda: tf.Phi3Config(**_DECODER),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**_DECODER, **_EXPERTS, shared_expert_intermediate_size=16, num_experts=4),
    "rwkv": lambda: tf.RwkvConfig(**_WIDTH, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48),
    "stablelm": lambda: tf.StableLmConfig(**_DECODER),
}
CLASSIFIERS = {
    "albert": lambda: tf.AlbertConfig(**_ENCODER, embedding_size=16),
    "canine": lambda: tf.CanineConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    "deberta": lambda: tf.DebertaV2Config(**_ENCODER),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=_VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, pad_token_id=0
    ),
    "electra": lambda: tf.ElectraConfig(**_ENCODER, embedding_size=16),
    "modernbert": lambda: tf.ModernBertConfig(
        **_ENCODER, max_position_embeddings=128, cls_token_id=1, sep_token_id=1, bos_token_id=1, eos_token_id=1
    ),
    "phi3": CAUSAL["phi3"],
    "roberta": lambda: tf.RobertaConfig(**_ENCODER, max_position_embeddings=128),
    "xlm": lambda: tf.XLMConfig(**_XLM),
}


def causal_lm(family: str) -> nn.Module:
    """A random causal LM of a family."""
    return _build(tf.AutoModelForCausalLM, CAUSAL[family]())


def classifier(family: str) -> nn.Module:
    """A random classifier of a family, with three classes."""
    config = CLASSIFIERS[family]()
    config.num_labels = 3
    return _build(tf.AutoModelForSequenceClassification, config)


def clip() -> nn.Module:
    """A random CLIP, which compares all images with all texts."""
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
    text = {**shape, "vocab_size": _VOCABULARY, "eos_token_id": 1, "bos_token_id": 0}
    image = {**shape, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=image, projection_dim=16)).eval()


def _build(auto: type, config: tf.PretrainedConfig) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config).eval()
