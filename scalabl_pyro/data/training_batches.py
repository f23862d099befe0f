"""What training reads: batch number t of a run, from rows in a seeded order, or from batches of the user's own."""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._process.random_state import scoped_seed
from .batch import Batch, Example
from .encoding import collate, encode
from .rows import Row, read_rows

logger = logging.getLogger(__name__)


class TrainingBatches:
    """Endless shuffled batches of similar length; batch t depends on (seed, t) alone, so a run can resume.

    Args:
        examples: the training set.
        batch_size: rows in a batch, at most.
        seed: Seed of the order.
        multiple: batches are padded to a multiple of so many tokens, so that shapes repeat.
    """

    #: Rows are sorted by length within windows of this many batches: little padding, and still a random order.
    WINDOW = 16

    def __init__(
        self, examples: Sequence[Example], batch_size: int, pad_token_id: int, *, seed: int, multiple: int = 1
    ) -> None:
        self.examples = examples
        self.multiple = multiple
        self.batch_size = min(batch_size, len(examples))
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.per_epoch = -(-len(examples) // self.batch_size)
        self._epoch = -1
        self._plan: list[list[int]] = []

    def __call__(self, step: int) -> Batch:
        """Batch number ``step``, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._order(epoch)
        rows = self._plan[position]
        return collate([self.examples[i] for i in rows], rows, self.pad_token_id, multiple=self.multiple)

    def _order(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        window = self.WINDOW * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda i: len(self.examples[i]))
            # Parts of equal size (within one row): a short rest would always hold the longest rows, and the plate
            # would weigh them up.
            count = -(-len(rows) // self.batch_size)
            batches += [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


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
    """What training reads: a function step -> batch, and N.

    Args:
        data: rows (dicts, a ``datasets.Dataset``, the path of a JSONL file), or an iterable of :class:`Batch` that can
            be restarted, such as a DataLoader.
        encode_row: a task's ``encode``.
        batch_size: rows in a batch made from rows.
        pad_token_id: fills shorter rows.
        num_data: N; needed for an iterable of batches whose data set has no length.
        seed: Seed of the order.
        multiple: batches made from rows are padded to a multiple of so many tokens.
        keeps_digest: Whether an iterable of batches keeps a digest of them, by which a replay is checked.

    Raises:
        ValueError: N is unknown, or contradicts the rows.
    """
    with scoped_seed(seed):  # a DataLoader draws from the global generator when it starts
        first = None if isinstance(data, str) or not isinstance(data, Iterable) else next(iter(data), None)
    if isinstance(data, Iterator) and first is not None:
        data = itertools.chain([first], data)  # looking at it took it out
    if isinstance(first, Batch):
        if num_data is None:
            num_data = _sized(getattr(data, "dataset", None))
        if num_data is None:
            raise ValueError(
                "train_data yields batches, so the size of the data set is unknown: pass num_data=N. It sets the "
                "weight of the KL against the data."
            )
        return Cycle(data, seed=seed, keeps_digest=keeps_digest), num_data
    examples = encode(read_rows(data), encode_row, need_target=True)
    if num_data not in (None, len(examples)):
        raise ValueError(f"num_data={num_data}, but train_data has {len(examples)} rows: leave num_data out.")
    return TrainingBatches(examples, batch_size, pad_token_id, seed=seed, multiple=multiple), len(examples)


def _sized(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


class Cycle:
    """Batches of an iterable in order, again and again.

    What the iterable draws from torch's global CPU generator in this process (the order of a DataLoader that shuffles)
    depends on (seed, number of the batch), not on the noise of training: so that a run can resume, by going through
    the batches again up to where it was.

    Args:
        batches: the iterable.
        seed: Seed of its draws.
        keeps_digest: Whether to keep a digest of the batches, by which a replay is checked.

    Attributes:
        count: batches handed out so far.
    """

    def __init__(self, batches: Iterable[Batch], *, seed: int = 0, keeps_digest: bool = False) -> None:
        self.batches = batches
        self.seed = seed
        self.iterator: Iterator[Batch] = iter(())
        self.count = 0
        self.keeps_digest = keeps_digest
        self._digest = hashlib.sha256()

    def __call__(self, step: int) -> Batch:
        """The next batch, whatever ``step`` says."""
        with scoped_seed(self.seed * 1_000_003 + self.count, gpus=False):
            batch = next(self.iterator, None)
            if batch is None:
                self.iterator = iter(self.batches)
                batch = next(self.iterator, None)
        if batch is None:
            raise ValueError("train_data yields no batches the second time: pass something that can be restarted.")
        if batch.target is None or len(batch) == 0:
            raise ValueError(f"The batch of step {step} is empty or has no targets.")
        if self.keeps_digest:
            for tensor in (batch.index, batch.inputs["input_ids"], batch.target):
                self._digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self.count += 1
        return batch

    def position(self) -> dict[str, Any]:
        """Where it is, for a checkpoint."""
        return {"count": self.count, "sha256": self._digest.hexdigest()}

    def replay(self, position: Mapping[str, Any]) -> None:
        """Go through the batches up to a position, from the start.

        Raises:
            ValueError: they are not the batches that were there before.
        """
        logger.info("going through %d batches again, up to where the run was", position["count"])
        while self.count < position["count"]:
            self(self.count)
        if self.position() != dict(position):
            raise ValueError(
                f"train_data does not give the {position['count']} batches again that the run was trained on: other "
                "data, an iterator that was used before, or an order that depends on more than the seed. Resuming "
                "needs rows, or a loader that yields the same batches each time the program starts (a generator= of "
                "its own, seeded; shuffling by torch's global generator is seeded by fit)."
            )
