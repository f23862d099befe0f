"""Rows of data -> tokenized examples -> right-padded batches of similar length.

A row is a dict, one line of a JSONL file, or one item of a ``datasets.Dataset``; a task turns it into an
:class:`Example`. Batches are right-padded: left padding gives NaN in some fused attention kernels, and with the
last real token of each row known it is not needed.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .rows import read_rows as read_rows  # public as scalabl_pyro.data.read_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One tokenized row.

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
        start: First row of this part in the joint batch of several processes.
        joint: Number of rows of that joint batch. None in one process.
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
