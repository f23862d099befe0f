"""Rows of data -> tokenised examples -> right-padded batches of similar length.

A row is a dict, one line of a JSONL file, or one item of a ``datasets.Dataset``; a task turns it into an
:class:`Example`. Batches are right-padded: left padding gives NaN in some fused attention kernels, and with the
last real token of each row known there is no need for it.
"""

import hashlib
import itertools
import logging
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._errors import check_positive
from ._lock import LOCK
from ._rng import scoped_seed
from .hub_rows import Row
from .rows import read_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
        inputs: token lists of one length, by the name the LLM knows them by; ``input_ids`` always.
        target: class index or number; None when the row has no answer.
        extras: further numbers that the task's likelihood needs.
        is_cut: whether the text was too long and lost its end.
    """

    inputs: dict[str, list[int]]
    target: float | int | None = None
    extras: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Batch:
    """B examples as tensors.

    Attributes:
        inputs: keyword arguments of the LLM, each (B, tokens).
        target: (B,) or None.
        index: (B,) position of each row in its data set.
        last: (B,) index of the last real token of each row.
        extras: further tensors (B, ...) for the likelihood.
        start: of a part of a joint batch of several processes: its first row there.
        joint: rows of that joint batch; None where there is no other.
    """

    inputs: dict[str, Tensor]
    target: Tensor | None
    index: Tensor
    last: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    start: int = 0
    joint: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply ``fn`` to every tensor."""
        return replace(
            self,
            inputs={k: fn(v) for k, v in self.inputs.items()},
            target=None if self.target is None else fn(self.target),
            index=fn(self.index),
            last=fn(self.last),
            extras={k: fn(v) for k, v in self.extras.items()},
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``."""
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch where a GPU can copy it from without making the host wait; as it is if it is on a GPU already."""
        return self if self.index.is_cuda else self.map(torch.Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        own = {"target": self.target, "index": self.index, "last": self.last}
        named = {k: v for k, v in own.items() if v is not None}
        return (
            named
            | {f"inputs.{k}": v for k, v in self.inputs.items()}
            | {f"extras.{k}": v for k, v in self.extras.items()}
        )

    def shapes(self) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
        """Names, shapes and dtypes of all tensors: what two batches share that one captured graph can serve."""
        return tuple((name, t.shape, t.dtype) for name, t in sorted(self.tensors().items()))

    def copy_(self, other: "Batch") -> None:
        """Overwrite the tensors with those of a batch of the same shapes."""
        mine, theirs = self.tensors(), other.tensors()
        for name, tensor in mine.items():
            tensor.copy_(theirs[name], non_blocking=True)

    def split(self, size: int) -> list["Batch"]:
        """Micro-batches of at most ``size`` rows."""

        def part(start: int) -> Batch:
            return self.map(lambda t: t[start : start + size])

        return [part(start) for start in range(0, len(self), size)]

    def without_target(self) -> "Batch":
        """The same inputs, unobserved."""
        return replace(self, target=None)


def encode(rows: Iterable[Row], encode_row: Callable[[Row], Example], *, need_target: bool) -> list[Example]:
    """Tokenise rows with a task's ``encode``; errors name the row."""
    examples = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"Row {i} is a {type(row).__name__}; expected a dict such as {{'question': ...}}.")
        try:
            with LOCK:  # a fast tokenizer refuses a second thread
                example = encode_row(row)
        except (ValueError, KeyError, TypeError) as error:
            message = error.args[0] if error.args else error
            raise ValueError(f"Row {i}{_row_id(row)}: {message}") from error
        if len(example) == 0:
            raise ValueError(f"Row {i}{_row_id(row)} is empty: its text gives no tokens.")
        if need_target and example.target is None:
            need = "which training and the likelihood need"
            raise ValueError(f"Row {i}{_row_id(row)} has no answer, {need}; its fields are {list(row)}.")
        if example.target is not None and not isinstance(example.target, numbers.Real):
            raise TypeError(f"Row {i}{_row_id(row)}: the answer {example.target!r} is no number.")
        if example.target is not None and not math.isfinite(example.target):
            raise ValueError(f"Row {i}{_row_id(row)}: the answer {example.target} is not finite.")
        examples.append(example)
    if not examples:
        raise ValueError("The data set has no rows.")
    if cut := sum(example.is_cut for example in examples):
        logger.warning("%d of %d rows were longer than max_length and lost the end of their text.", cut, len(examples))
    return examples


def check_tokens(examples: Sequence[Example], llm: Any, pad_token_id: int) -> None:
    """Raise ValueError for a token that the embeddings of ``llm`` lack: a GPU could not be used any more after it."""
    embeddings = getattr(llm, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    if size is None:
        return
    if not 0 <= pad_token_id < size:
        raise ValueError(
            f"The pad token is {pad_token_id}, but the model has embeddings for 0 to {size - 1} only: use a token that "
            "it knows, tokenizer.pad_token = tokenizer.eos_token, or call model.resize_token_embeddings()."
        )
    for i, example in enumerate(examples):
        bad = [token for token in example.inputs["input_ids"] if not 0 <= token < size]
        if bad:
            raise ValueError(
                f"Row {i} has the token {bad[0]}, but the model has embeddings for 0 to {size - 1} only: its tokenizer "
                "is that of another model, or has had tokens added without model.resize_token_embeddings()."
            )


def _row_id(row: Row) -> str:
    return f" (id {row['id']!r})" if "id" in row else ""


def collate(examples: Sequence[Example], index: Sequence[int], pad_token_id: int, *, multiple: int = 1) -> Batch:
    """Right-pad examples to a batch, ``multiple`` of so many tokens; ``index`` are their positions in the data set."""
    width = -(-max(map(len, examples)) // multiple) * multiple
    inputs = {}
    for name in examples[0].inputs:
        fill = pad_token_id if name == "input_ids" else 0
        inputs[name] = torch.tensor([e.inputs[name] + [fill] * (width - len(e)) for e in examples])
    inputs["attention_mask"] = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in examples])
    targets = [e.target for e in examples]
    return Batch(
        inputs=inputs,
        target=None if any(t is None for t in targets) else torch.tensor(targets),
        index=torch.tensor(list(index)),
        last=torch.tensor([len(e) - 1 for e in examples]),
        extras={k: torch.tensor([e.extras[k] for e in examples]) for k in examples[0].extras},
    )


class TrainingBatches:
    """Endless shuffled batches of similar length; batch t depends on (seed, t) alone, so a run can resume.

    Args:
        examples: the training set.
        batch_size: rows in a batch, at most.
        seed: of the order.
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


def evaluation_batches(examples: Sequence[Example], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Every example once, longest first, so that running out of memory shows at once."""
    check_positive(batch_size=batch_size)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield collate([examples[i] for i in rows], rows, pad_token_id)


def training_source(
    data: Any,
    encode_row: Callable[[Row], Example],
    *,
    batch_size: int,
    pad_token_id: int,
    num_data: int | None = None,
    seed: int = 0,
    multiple: int = 1,
) -> tuple[Callable[[int], Batch], int]:
    """What training reads: a function step -> batch, and N.

    Args:
        data: rows (dicts, a ``datasets.Dataset``, the path of a JSONL file), or an iterable of :class:`Batch` that can
            be restarted, such as a DataLoader.
        encode_row: a task's ``encode``.
        batch_size: rows in a batch made from rows.
        pad_token_id: fills shorter rows.
        num_data: N; needed for an iterable of batches whose data set has no length.
        seed: of the order.
        multiple: batches made from rows are padded to a multiple of so many tokens.

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
        return Cycle(data, seed=seed), num_data
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
        seed: of its draws.

    Attributes:
        count: batches handed out so far.
        keeps_digest: whether to keep a digest of them, by which a replay is checked.
    """

    def __init__(self, batches: Iterable[Batch], *, seed: int = 0) -> None:
        self.batches = batches
        self.seed = seed
        self.iterator: Iterator[Batch] = iter(())
        self.count = 0
        self.keeps_digest = False
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
