"""From rows to tokenized examples, and from examples to right-padded batches."""

import logging
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .._errors import check_positive
from .._process.lock import LOCK
from .batch import Batch, Example
from .rows import Row
from .rows import read_rows as read_rows  # public as scalabl_pyro.data.read_rows

logger = logging.getLogger(__name__)


def encode(rows: Iterable[Row], encode_row: Callable[[Row], Example], *, need_target: bool) -> list[Example]:
    """Tokenize rows with a task's ``encode``; errors name the row."""
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
            raise TypeError(f"Row {i}{_row_id(row)}: the answer {example.target!r} is not a number.")
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
