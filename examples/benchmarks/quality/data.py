"""Data sets of the quality benchmark: the split that all runs share, the task, and batches with few shapes."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _support.datasets import distinct, pick
from transformers import PreTrainedTokenizerBase

import scalabl_pyro as sp
from scalabl_pyro.data import Batch, collate, encode, read_rows

from .sources import Source, rows_of, source_of

#: Prompts are padded to a few widths in tokens. Each width is a multiple of this number.
MULTIPLE = 16


@dataclass(frozen=True)
class DataSet:
    """Rows of one data set after the split, and their task.

    Attributes:
        name: Name of the data set.
        train: Training rows.
        val: Validation rows, cut from the published training set.
        test: Test rows, predicted once at the end of a run.
        ood: Rows of other data sets by name, with the question of this one.
        task: Task of all rows.
    """

    name: str
    train: list[dict]
    val: list[dict]
    test: list[dict]
    ood: Mapping[str, list[dict]]
    task: sp.MultipleChoice = field(repr=False)


class FixedWidthBatches:
    """Full batches of the training rows, padded to a few widths so that shapes repeat.

    Each iteration is one epoch. It visits the rows in random order, and leaves out the last rows if they do not fill a
    batch. Rows are sorted by length within windows of 16 batches.

    Args:
        rows: Training rows.
        task: Task that encodes the rows.
        batch_size: Rows per batch.
        num_widths: Largest number of widths. The widths are quantiles of the lengths of the rows.
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
        """Yield one epoch, in an order drawn from torch's global generator, which ``fit`` seeds."""
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
    """Load and split a data set. Validation rows come from the published training set, never from the test set.

    Args:
        name: Key of ``SOURCES``, or ``name=train.jsonl,test.jsonl``.
        tokenizer: Tokenizer of the LLM.
        data_dir: Folder that is searched first for local files, itself and one level below.
        train_rows: Number of training rows (0: all rows that are left after validation).
        val_rows: Number of validation rows.
        test_rows: Number of test rows (0: all).
        ood_rows: Largest number of rows of each other data set.
        split_seed: Seed of the split. It is not the seed of a run.

    Raises:
        ValueError: The name is unknown, or there are too few rows.
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
        test = pick(test, test_rows, split_seed)
    task = make_task(source, train, tokenizer)
    ood = {}
    for other in source.ood:
        try:
            found = rows_of(other, "test", data_dir)
        except (OSError, ValueError, ImportError) as error:
            print(f"{name}: the other data set {other} is left out: {str(error).splitlines()[0]}", flush=True)
            continue
        if source.labels != ():  # Rows get the question of this data set, and have no answer.
            found = [{"question": row["question"], "choices": train[0]["choices"]} for row in found]
        ood[other] = pick(found, ood_rows, split_seed)
    return DataSet(name, train, val, test, ood, task)


def split(
    pool: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]], *, train_rows: int, val_rows: int, seed: int
) -> tuple[list[dict], list[dict], list[dict]]:
    """Draw training and validation rows from ``pool`` at random, without duplicates and without rows of test.

    Returns:
        Training, validation and test rows.

    Raises:
        ValueError: The pool has too few different rows.
    """
    fresh = [dict(row) for row in distinct(pool, but=test)]
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
    """Make the task, which is answered with a word or a letter."""
    options: dict[str, Any] = {"template": source.template, "chat": False, "max_length": source.max_length}
    if source.labels != ():
        options["labels"] = source.labels or tuple(rows[0]["choices"])
    return sp.MultipleChoice(tokenizer, **options)


def _two(paths: str) -> list[str]:
    parts = paths.split(",")
    if len(parts) != 2:
        raise ValueError(f"{paths!r}: expected two files, name=train.jsonl,test.jsonl.")
    return parts
