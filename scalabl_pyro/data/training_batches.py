"""Batches for training: made from rows in a seeded order, or taken from the user's own iterable of batches."""

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._arguments import known_arguments
from .._errors import check_count
from .._process.random_state import scoped_seed
from .._values import plain
from .batch import Batch, Example, collate_rounded, digest_of, graded_length
from .encoding import encode_data
from .rows import Row

logger = logging.getLogger(__name__)


class TrainingBatches:
    """Endless shuffled batches of rows that have similar lengths.

    Each epoch has each row once. A random permutation of all rows is cut into windows of :attr:`WINDOW` batches; the
    rows of a window are sorted by length and cut into batches of one size, up to one row; and the batches of the epoch
    come in random order. So each row is equally likely at each step of an epoch, and the mean of the gradients over
    an epoch is that of the data set. Only which rows share a batch depends on their lengths.

    Batch t depends only on the seed and t, so a run can resume at any step.

    Args:
        examples: The training set.
        batch_size: Largest number of rows per batch.
        pad_token_id: Token that fills shorter rows.
        seed: Seed of the order.
        multiple: If it is larger than 1, lengths are rounded up so that shapes repeat: to its multiples, and to
            multiples of its doublings where rows are longer, see :func:`~scalabl_pyro.data.batch.graded_length`.

    Example:
        >>> from scalabl_pyro.data import Example, TrainingBatches
        >>> examples = [Example({"input_ids": [1] * length}, target=0) for length in (2, 5, 3)]
        >>> batches = TrainingBatches(examples, batch_size=2, pad_token_id=0, seed=0)
        >>> sorted(batches(0).index.tolist() + batches(1).index.tolist())  # one epoch
        [0, 1, 2]
    """

    #: Rows are sorted by length within windows of this many batches. This saves padding and keeps the order random.
    WINDOW = 32

    def __init__(
        self, examples: Sequence[Example], batch_size: int, pad_token_id: int, *, seed: int, multiple: int = 1
    ) -> None:
        self.examples = examples
        self.multiple = multiple
        self.longest = max(map(len, examples))
        self.batch_size = min(batch_size, len(examples))
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.per_epoch = -(-len(examples) // self.batch_size)
        self._epoch = -1
        self._plan: list[list[int]] = []

    def __call__(self, step: int) -> Batch:
        """Return batch number ``step``, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._order(epoch)
        rows = self._plan[position]
        return collate_rounded([self.examples[i] for i in rows], rows, self.pad_token_id, self._rounded_up)

    def _rounded_up(self, length: int) -> int:
        return length if self.multiple == 1 else graded_length(length, self.multiple, self.longest)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of tokens, answers and other numbers of all rows, in their order."""
        return digest_of(self.examples)

    def _order(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, epoch))
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        window = self.WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda i: len(self.examples[i]))
            # All parts have the same size, up to one row. A short last part would always hold the longest rows, and
            # the plate would give each of them a larger weight.
            count = -(-len(rows) // self.batch_size)
            batches += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@known_arguments
def training_source(
    data: Any,
    encode_row: Callable[[Row], Example],
    *,
    batch_size: int,
    pad_token_id: int,
    num_data: int | None = None,
    seed: int = 0,
    multiple: int = 1,
    keeps_digest: bool = False,
) -> tuple[Callable[[int], Batch], int]:
    """Return the function ``step -> batch`` that training reads, and the size N of the data set.

    Args:
        data: Rows in any form that ``read_rows`` takes, or an iterable of :class:`Batch` that can
            be restarted, such as a DataLoader.
        encode_row: The task's method ``encode``.
        batch_size: Largest number of rows per batch, for data given as rows.
        pad_token_id: Token that fills shorter rows.
        num_data: N, needed for an iterable of batches whose data set has no length.
        seed: Seed of the order.
        multiple: For data given as rows, lengths are rounded up, see :class:`TrainingBatches`.
        keeps_digest: For an iterable of batches, whether to keep a digest of them, which a replay is compared with.

    Returns:
        The function, and N.

    Raises:
        ValueError: N is unknown, or differs from the number of rows.

    Example:
        >>> from scalabl_pyro.data import Example, training_source
        >>> def encode_row(row):
        ...     return Example({"input_ids": list(row["text"].encode())}, target=row["label"])
        >>> rows = [{"text": "ab", "label": 1}, {"text": "c", "label": 0}]
        >>> batch_of, num_data = training_source(rows, encode_row, batch_size=1, pad_token_id=0)
        >>> len(batch_of(0)), num_data
        (1, 2)
    """
    with scoped_seed(seed):  # a DataLoader draws from the global generator when it starts
        first = None if isinstance(data, str) or not isinstance(data, Iterable) else next(iter(data), None)
    if isinstance(data, Iterator) and first is not None:
        data = itertools.chain([first], data)  # put back the batch that was taken out
    num_data = plain(num_data)
    if num_data is not None:
        check_count(num_data=num_data)
    if isinstance(first, Batch):
        if num_data is None:
            num_data = _sized(getattr(data, "dataset", None))
        if num_data is None:
            raise ValueError(
                "train_data yields batches, so the size N of the data set is unknown: pass num_data=N. It weights the "
                "log-likelihood against the KL."
            )
        return Cycle(data, seed=seed, keeps_digest=keeps_digest, first=first), int(num_data)
    examples = encode_data(data, encode_row, need_target=True)
    if num_data not in (None, len(examples)):
        raise ValueError(f"num_data={num_data}, but train_data has {len(examples)} rows: leave num_data out.")
    return TrainingBatches(examples, batch_size, pad_token_id, seed=seed, multiple=multiple), len(examples)


def seen_targets(batches: Callable[[int], Batch]) -> tuple[list[float | int], bool]:
    """Return the training targets that are known before the first step, and whether these are all of them.

    Args:
        batches: The function that :func:`training_source` returned.
    """
    if isinstance(batches, TrainingBatches):
        return [example.target for example in batches.examples if example.target is not None], True
    first = batches.first if isinstance(batches, Cycle) else None
    return [] if first is None or first.target is None else first.target.flatten().tolist(), False


def _sized(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


class Cycle:
    """Endless repetition of the batches of an iterable, in its order.

    The iterable may draw from torch's global CPU generator, as a DataLoader that shuffles does. The generator is
    seeded by the seed and the number of the batch, independently of the noise of training. A run can therefore resume
    by reading the batches again, up to the step where it stopped.

    Args:
        batches: Iterable of batches that can be restarted.
        seed: Seed of what the iterable draws.
        keeps_digest: Whether to keep a digest of the batches, which a replay is compared with.
        first: The first of them, whose targets a task sees before training.

    Attributes:
        count: Number of batches returned so far.

    Example:
        >>> import torch
        >>> from scalabl_pyro.data import Batch, Cycle
        >>> one = torch.ones(1, dtype=torch.long)
        >>> batches = Cycle([Batch({"input_ids": one[:, None]}, target=one, index=one, last=0 * one)])
        >>> len(batches(0)), len(batches(1)), batches.count
        (1, 1, 2)
    """

    def __init__(
        self, batches: Iterable[Batch], *, seed: int = 0, keeps_digest: bool = False, first: Batch | None = None
    ) -> None:
        self.batches = batches
        self.first = first
        self.seed = seed
        self.iterator: Iterator[Batch] = iter(())
        self.count = 0
        self.keeps_digest = keeps_digest
        self._digest = hashlib.sha256()

    def __call__(self, step: int) -> Batch:
        """Return the next batch. ``step`` is used only in error messages."""
        with scoped_seed(_seed_of(self.seed, self.count), gpus=False):
            batch = next(self.iterator, None)
            if batch is None:
                self.iterator = iter(self.batches)
                batch = next(self.iterator, None)
        if batch is None:
            raise ValueError(
                "train_data yields no batches the second time: pass something that can be restarted, such as a list "
                "or a DataLoader."
            )
        if batch.target is None or len(batch) == 0:
            raise ValueError(
                f"The batch of step {step} is empty or has no targets. Leave empty batches out, and give each row an "
                "answer."
            )
        if self.keeps_digest:
            for tensor in (batch.index, batch.inputs["input_ids"], batch.target):
                self._digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self.count += 1
        return batch

    def position(self) -> dict[str, Any]:
        """Return the number of batches read so far and their digest, for a checkpoint."""
        return {"count": self.count, "sha256": self._digest.hexdigest()}

    def replay(self, position: Mapping[str, Any]) -> None:
        """Read the batches again from the start, up to a position.

        Args:
            position: What :meth:`position` returned in the run that is resumed.

        Raises:
            ValueError: The batches differ from those of that run.
        """
        logger.info("Reading the first %d batches again, to resume after them.", position["count"])
        while self.count < position["count"]:
            self(self.count)
        if self.position() != dict(position):
            raise ValueError(
                f"train_data does not repeat the first {position['count']} batches of the run that is resumed. "
                "Possible causes: other data, an iterator that was used before, or an order that depends on more than "
                "the seed. To resume, pass rows, or a loader that yields the same batches at each program start: "
                "give it a seeded generator=, or let it shuffle by torch's global generator (fit seeds it)."
            )


def _seed_of(seed: int, index: int) -> int:
    """Seed of an epoch or a batch. It wraps around at 64 bits, so that every seed works."""
    return (int(seed) * 1_000_003 + index + 2**63) % 2**64 - 2**63
