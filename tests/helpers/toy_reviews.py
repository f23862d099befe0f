"""The files of the page "For people who do not know Pyro" at toy size: two tables, and a model that knows their words.

All words of the tables and of the prompt are tokens, so that no two classes have the same name for the model.
"""

from pathlib import Path

import pandas as pd
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

KINDS = ("complaint", "praise")
VOCABULARY = [*tiny.VOCABULARY, *KINDS, "Label", "broke", "works"]


def write(folder: Path, name: str) -> None:
    """Write ``reviews.csv``, ``new.csv``, and a tiny model in a folder with the name of one on the hub."""
    lines = [
        {"review": f"the {word} {tiny.LETTERS[i // 10]} {i % 10}", "kind": kind}
        for i in range(60)
        for word, kind in zip(("broke", "works"), KINDS, strict=True)
    ]
    pd.DataFrame(lines[:110]).to_csv(folder / "reviews.csv", index=False)
    pd.DataFrame(lines[110:])[["review"]].to_csv(folder / "new.csv", index=False)
    tiny.causal_lm(vocab_size=len(VOCABULARY)).save_pretrained(folder / name)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder / name)
