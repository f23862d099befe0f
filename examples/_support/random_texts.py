"""Prompts and completions of random words for benchmarks of time and memory, and a tokenizer of these words."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: Words of the texts, one token each.
WORDS = 400


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word."""
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def random_texts(rows: int, tokens: int) -> list[dict]:
    """Make rows of random words, half prompt and half completion.

    Args:
        rows: Number of rows.
        tokens: Tokens per row, with the end token.
    """
    half = tokens // 2
    words = torch.randint(WORDS, (rows, tokens - 1)).tolist()
    return [
        {"prompt": " ".join(f"w{i}" for i in row[:half]), "completion": " " + " ".join(f"w{i}" for i in row[half:])}
        for row in words
    ]
