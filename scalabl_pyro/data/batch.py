"""Examples (tokenized rows), and right-padded batches of them.

Batches are padded on the right, because left padding gives NaN in some fused attention kernels. The position of the
last real token of each row is kept, so left padding is not needed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._arguments import known_arguments
from .._errors import check_count
from ..lora.token_log_probs import NO_TOKEN


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    Attributes:
        inputs: Lists of one length, by the name of the LLM's argument. ``input_ids`` is required.
        target: Class index or number, or the tokens of a completion. None if the row has no answer.
        extras: Other numbers that the likelihood of the task needs: one per row, or a list of them.
        is_cut: Whether the text was too long and lost a part.

    Example:
        >>> from scalabl_pyro.data import Example
        >>> len(Example({"input_ids": [5, 6, 7]}, target=1))
        3
    """

    inputs: dict[str, list[int]]
    target: Any = None
    extras: dict[str, Any] = field(default_factory=dict)
    is_cut: bool = False

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


def digest_of(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of tokens, answers and other numbers of all examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.inputs, example.target, example.extras], default=float).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """B examples as tensors.

    Where several processes train together, each one works on a part of their joint batch.

    Attributes:
        inputs: Keyword arguments of the LLM, each of shape (B, tokens).
        target: Answers, shape (B,), or tokens of completions, (B, T), with ``NO_TOKEN`` behind them. May be None.
        index: Position of each row in its data set, shape (B,).
        last: Index of the last real token of each row, shape (B,).
        extras: Other tensors for the likelihood, each of shape (B, ...).
        start: Position of the first row in the joint batch.
        joint: Number of rows of the joint batch; None for a batch that is not a part.

    Example:
        >>> import torch
        >>> from scalabl_pyro.data import Batch
        >>> tokens = torch.tensor([[5, 6, 7], [8, 9, 0]])
        >>> batch = Batch({"input_ids": tokens}, target=None, index=torch.arange(2), last=torch.tensor([2, 1]))
        >>> [len(part) for part in batch.split(1)]
        [1, 1]
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
        """Return a batch with ``fn`` applied to every tensor."""
        return replace(
            self,
            inputs={k: fn(v) for k, v in self.inputs.items()},
            target=None if self.target is None else fn(self.target),
            index=fn(self.index),
            last=fn(self.last),
            extras={k: fn(v) for k, v in self.extras.items()},
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``. Apple's GPUs get float32 for float64."""
        if torch.device(device).type == "mps":
            return self.map(lambda t: (t.float() if t.dtype == torch.float64 else t).to(device))
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory, so that the host need not wait for its copy to a GPU."""
        return self if self.index.is_cuda else self.map(torch.Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name: ``target``, ``index``, ``last``, ``inputs.*`` and ``extras.*``."""
        own = {"target": self.target, "index": self.index, "last": self.last}
        named = {k: v for k, v in own.items() if v is not None}
        return (
            named
            | {f"inputs.{k}": v for k, v in self.inputs.items()}
            | {f"extras.{k}": v for k, v in self.extras.items()}
        )

    def shapes(self) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
        """Return names, shapes and dtypes of all tensors; batches that share them can use one captured CUDA graph."""
        return tuple((name, t.shape, t.dtype) for name, t in sorted(self.tensors().items()))

    def copy_(self, other: "Batch") -> None:
        """Overwrite all tensors with those of a batch of the same shapes."""
        mine, theirs = self.tensors(), other.tensors()
        for name, tensor in mine.items():
            tensor.copy_(theirs[name], non_blocking=True)

    def split(self, size: int) -> list["Batch"]:
        """Split the batch into micro-batches of at most ``size`` rows."""

        def part(start: int) -> Batch:
            return self.map(lambda t: t[start : start + size])

        return [part(start) for start in range(0, len(self), size)]

    def without_target(self) -> "Batch":
        """Return the batch without its answers."""
        return replace(self, target=None)


@known_arguments
def collate(examples: Sequence[Example], index: Sequence[int], pad_token_id: int, *, multiple: int = 1) -> Batch:
    """Build a right-padded batch of examples.

    Args:
        examples: B examples, at least one.
        index: Position of each example in its data set.
        pad_token_id: Token that fills shorter rows.
        multiple: The number of tokens per row is rounded up to a multiple of this number.

    Returns:
        Batch of B rows. Its target is None if an example has none.

    Example:
        >>> examples = [Example({"input_ids": [5, 6, 7]}, target=1), Example({"input_ids": [8]}, target=0)]
        >>> collate(examples, index=[0, 1], pad_token_id=0).inputs["input_ids"]
        tensor([[5, 6, 7],
                [8, 0, 0]])
    """
    return collate_rounded(examples, index, pad_token_id, lambda length: _rounded_up(length, multiple))


def collate_rounded(
    examples: Sequence[Example], index: Sequence[int], pad_token_id: int, round_up: Callable[[int], int]
) -> Batch:
    """Build a batch as :func:`collate` does, whose lengths any function rounds up.

    Args:
        examples: B examples, at least one.
        index: Position of each example in its data set.
        pad_token_id: Token that fills shorter rows.
        round_up: Gives the padded length, from the largest length of the batch.
    """
    width = round_up(max(map(len, examples)))
    inputs = {}
    for name in examples[0].inputs:
        fill = pad_token_id if name == "input_ids" else 0
        inputs[name] = torch.tensor([e.inputs[name] + [fill] * (width - len(e)) for e in examples])
    inputs["attention_mask"] = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in examples])
    targets = [e.target for e in examples]
    return Batch(
        inputs=inputs,
        target=None if any(t is None for t in targets) else collate_targets(targets, round_up=round_up),
        index=torch.tensor(list(index)),
        last=torch.tensor([len(e) - 1 for e in examples]),
        extras={k: _padded([e.extras[k] for e in examples], 0, round_up) for k in examples[0].extras},
    )


def graded_length(length: int, step: int, longest: int) -> int:
    """Round a length up so that few lengths are left, and at most about a fifth is added to a long one.

    Args:
        length: Largest length of a batch.
        step: Lengths below eight times this number are rounded up to its multiples. From each doubling on, multiples
            are twice as large, so that each doubling of the length has four to eight lengths.
        longest: Largest length of all rows. Nothing up to it is rounded beyond the next multiple of ``step``.

    Example:
        >>> [graded_length(n, 4, longest=510) for n in (3, 13, 33, 70, 300, 510)]
        [4, 16, 40, 80, 320, 512]
    """
    grade = step
    while 8 * grade <= length:
        grade *= 2
    end = _rounded_up(longest, step)
    return min(_rounded_up(length, grade), end) if length <= end else _rounded_up(length, step)


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def collate_targets(targets: Sequence[Any], *, round_up: Callable[[int], int] = int) -> Tensor:
    """Class indices are int64, numbers float64: float32 would round targets that are much larger than their spread."""
    if isinstance(targets[0], list):
        return _padded(targets, NO_TOKEN, round_up)
    return torch.tensor(targets, dtype=torch.float64 if any(isinstance(t, float) for t in targets) else None)


def _padded(values: Sequence[Any], fill: int, round_up: Callable[[int], int]) -> Tensor:
    """Return one number per row, (B,), or lists that are filled to one length, (B, T)."""
    if not isinstance(values[0], list):
        return torch.tensor(values)
    width = round_up(max(map(len, values)))
    return torch.tensor([row + [fill] * (width - len(row)) for row in values], dtype=torch.long)


@known_arguments
def evaluation_batches(examples: Sequence[Example], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Yield batches that contain every example once, the longest first, so that a lack of memory shows at once.

    Args:
        examples: The data set.
        batch_size: Rows per batch.
        pad_token_id: Token that fills shorter rows.

    Raises:
        ValueError: ``batch_size`` is not a whole number, 1 or more.

    Example:
        >>> examples = [Example({"input_ids": [1] * length}) for length in (2, 5, 3)]
        >>> [batch.index.tolist() for batch in evaluation_batches(examples, 2, pad_token_id=0)]
        [[1, 2], [0]]
    """
    check_count(batch_size=batch_size)
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield collate([examples[i] for i in rows], rows, pad_token_id)
