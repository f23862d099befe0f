"""Tiny random models, a tokenizer and a data set that a tiny model can learn: everything offline."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

COLOURS = ["red", "green", "blue", "black"]
WORDS = ["the", "sky", "grass", "rose", "night", "is", "what", "colour", "?", ".", "Answer", ":", "Question", "of", "a"]
LETTERS = [chr(c) for c in range(ord("A"), ord("Z") + 1)]
VOCABULARY = ["<pad>", "<unk>", *WORDS, *COLOURS, *LETTERS, *map(str, range(10)), "user", "assistant"]


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Words and single punctuation marks as tokens."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}"
        )
    return fast


_SHAPE = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_DECODER = {**_SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 128}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_DECODER),
    "llama-tied": lambda: LlamaConfig(**_DECODER, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_DECODER, sliding_window=64),
    "qwen2": lambda: Qwen2Config(**_DECODER),
    "qwen3": lambda: Qwen3Config(**_DECODER, head_dim=8),
    "gemma": lambda: GemmaConfig(**_DECODER, head_dim=8),
    "gpt2": lambda: GPT2Config(vocab_size=len(VOCABULARY), n_embd=32, n_head=4, n_layer=2, n_positions=128, pad_token_id=0),
    "bert": lambda: BertConfig(**_SHAPE, intermediate_size=48, pad_token_id=0, max_position_embeddings=128),
}


def causal_lm(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random causal LM of a family."""
    config = CONFIGS[family]()
    for key, value in overrides.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def classifier(family: str = "llama", *, num_labels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random sequence classifier of a family."""
    config = CONFIGS[family]()
    config.num_labels = num_labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()


def question_rows(n: int = 24, *, seed: int = 0, num_choices: int = 4) -> list[dict]:
    """Questions whose answer is a fixed choice for each noun; lengths vary."""
    generator = torch.Generator().manual_seed(seed)
    nouns = ["sky", "grass", "rose", "night"]
    rows = []
    for i in range(n):
        which = int(torch.randint(len(nouns), (1,), generator=generator))
        filler = " the" * int(torch.randint(0, 5, (1,), generator=generator))
        question = f"what colour is{filler} {nouns[which]} ?"
        rows.append({"id": f"q{i}", "question": question, "choices": COLOURS[:num_choices], "answer": which % num_choices})
    return rows


def text_rows(n: int = 24, *, num_labels: int = 3, seed: int = 0) -> list[dict]:
    """Texts with an integer label."""
    return [{"text": r["question"], "label": r["answer"] % num_labels} for r in question_rows(n, seed=seed)]
