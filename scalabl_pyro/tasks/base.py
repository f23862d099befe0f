"""What all tasks share: a row becomes tokens, and the LLM's output a distribution over the answer."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .._errors import nearest
from .._process.lock import LOCK
from .._process.pyro_modes import Program
from ..data.batch import Batch, Example
from ..data.rows import Row
from ..lora.forward import LatentLLM


class Task(Program):
    """Likelihood p(y | outputs of the LLM), and the prompt that asks for y.

    Parameters and PyroParams of a task are learned with everything else and saved with the posterior.

    Args:
        tokenizer: a Hugging Face tokenizer with a pad token; None for a module that is fed no text.
        max_length: longest prompt in tokens; longer ones lose the end of their text, which is logged.
    """

    #: Constructor arguments besides the tokenizer, saved with a posterior and given back on loading.
    options: tuple[str, ...] = ("max_length",)
    without_tokenizer = True
    #: Names of the classes; None for a likelihood over numbers.
    classes: Sequence[str] | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, *, max_length: int | None = None) -> None:
        super().__init__()
        if not ((tokenizer is None and self.without_tokenizer) or isinstance(tokenizer, PreTrainedTokenizerBase)):
            raise TypeError(
                f"tokenizer={tokenizer!r}: expected a Hugging Face tokenizer, AutoTokenizer.from_pretrained(...)."
            )
        if tokenizer is not None and tokenizer.pad_token_id is None:
            raise ValueError(
                "The tokenizer has no pad token, so prompts of different length cannot share a batch: set "
                "tokenizer.pad_token = tokenizer.eos_token."
            )
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"max_length={max_length!r} must be a positive number of tokens, or None.")
        self.tokenizer: Any = tokenizer
        self.max_length = max_length

    @property
    def pad_token_id(self) -> int:
        """Fills the right end of shorter rows."""
        return 0 if self.tokenizer is None else self.tokenizer.pad_token_id

    def encode(self, row: Row) -> Example:
        """Tokenize one row."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(row) -> Example.")

    def outputs(self, llm: LatentLLM, batch: Batch, s: Tensor) -> Tensor:
        """What the likelihood needs of the LLM for each row, (..., B, K); by default its logits, float32."""
        return at_least_float32(llm(**batch.inputs, s=s).logits)

    def likelihood(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Distribution of y given ``outputs`` (..., B, K): batch shape (..., B)."""
        raise NotImplementedError(f"{type(self).__name__} must define likelihood(outputs, batch) -> distribution.")

    def distribution(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Build :meth:`likelihood` while no other thread runs a Pyro program.

        A task is a Pyro program, and Pyro's settings belong to the process. Only the construction takes the lock: use
        the distribution (``log_prob``, ``sample``) without it.

        Args:
            outputs: What :meth:`outputs` gave, shape (..., B, K).
            batch: The B rows.

        Returns:
            Distribution of y, batch shape (..., B).
        """
        with LOCK:
            return self.likelihood(outputs, batch)

    def forward(self, outputs: Tensor, batch: Batch) -> dist.TorchDistribution:
        """:meth:`likelihood` as a Pyro program, in which the task's PyroParams are param sites."""
        return self.likelihood(outputs, batch)


def copy_task(task: Task) -> Task:
    """A copy of a task and its parameters that shares the tokenizer."""
    return copy.deepcopy(task, {id(task.tokenizer): task.tokenizer})


def at_least_float32(x: Tensor) -> Tensor:
    """Log-probabilities are computed in float32 over a half-precision model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def field_of(row: Row, name: str) -> Any:
    """A field that a row must have.

    Raises:
        ValueError: it has none of that name, or nothing in it.
    """
    if name not in row:
        raise ValueError(f"there is no field {name!r}. {nearest(name, map(str, row))}")
    if is_missing(row[name]):
        raise ValueError(f"the field {name!r} is missing ({row[name]}).")
    return row[name]


def is_missing(value: Any) -> bool:
    """None, or the NaN that stands for it in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))
