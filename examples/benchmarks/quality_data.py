"""Data sets of the quality benchmark: where rows come from, how they are asked, and the one split of all runs."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sources
import torch
from quality_sources import Source, rows_of, source_of
from transformers import PreTrainedTokenizerBase

import scalabl_pyro as sp
from scalabl_pyro.data import Batch, collate, encode, read_rows

#: Prompts are padded to one of a few widths, each a multiple of so many tokens.
MULTIPLE = 16


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


def _two(paths: str) -> list[str]:
    parts = paths.split(",")
    if len(parts) != 2:
        raise ValueError(f"{paths!r}: expected two files, name=train.jsonl,test.jsonl.")
    return parts


def _content(row: Mapping[str, Any]) -> str:
    """What makes two rows the same row: question and choices."""
    return json.dumps([str(row["question"]).strip().lower(), list(row["choices"])])
