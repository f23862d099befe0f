"""Rows of data -> tokenised examples -> right-padded batches of similar length.

A row is a dict, one line of a JSONL file, or one item of a ``datasets.Dataset``; a task turns it into an
:class:`Example`. Batches are right-padded: left padding gives NaN in some fused attention kernels, and with the
last real token of each row known there is no need for it.
"""

import logging
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._errors import check_positive
from .._process.lock import LOCK
from .hub_rows import Row
from .rows import read_rows as read_rows  # public as scalabl_pyro.data.read_rows

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


def evaluation_batches(examples: Sequence[Example], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Every example once, longest first, so that running out of memory shows at once."""
    check_positive(batch_size=batch_size)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield collate([examples[i] for i in rows], rows, pad_token_id)
