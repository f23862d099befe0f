"""Encoding: rows become tokenized examples, whose tokens the LLM must know."""

import logging
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .._arguments import known_arguments
from .._errors import MissingFieldError, MissingValueError
from .._process.lock import LOCK
from .._values import is_missing, plain
from ..lora.position_table import position_limit, trained_positions
from ..lora.targets import input_embeddings
from .batch import Example
from .column_notes import count_of_gaps, note_columns, rows_in_words
from .containers import check_row
from .row_form import form_for
from .rows import Row, rows_for

logger = logging.getLogger(__name__)


def encode_data(
    source: Any, encode_row: Callable[[Row], Example], *, need_target: bool, split: str = "train"
) -> list[Example]:
    """Read rows in any form for a task, and tokenize them.

    Args:
        source: Rows in any form that :func:`~scalabl_pyro.data.read_rows` takes.
        encode_row: The task's method ``encode``.
        need_target: Whether every row must have an answer.
        split: Split of a hub data set.

    Raises:
        FileNotFoundError, TypeError, ValueError: As for :func:`~scalabl_pyro.data.read_rows` and :func:`encode`.
    """
    return encode(rows_for(encode_row, source, split=split), encode_row, need_target=need_target)


@known_arguments
def encode(rows: Iterable[Row], encode_row: Callable[[Row], Example], *, need_target: bool) -> list[Example]:
    """Tokenize rows with the ``encode`` method of a task.

    Args:
        rows: Rows of a data set.
        encode_row: The task's method ``encode``.
        need_target: Whether every row must have an answer.

    Returns:
        One example per row, in the order of the rows.

    Raises:
        TypeError: A row is not a dict, or its answer is not a number.
        ValueError: The task refuses a row, a row has no tokens or no answer, or there are no rows. The message gives
            the number of the row, and its ``id`` if it has one.

    Example:
        >>> from scalabl_pyro.data import Example, encode
        >>> def encode_row(row):
        ...     return Example({"input_ids": list(row["text"].encode())}, target=row["label"])
        >>> encode([{"text": "ab", "label": 1}], encode_row, need_target=True)[0].inputs
        {'input_ids': [97, 98]}
    """
    examples: list[Example] = []
    unanswered: list[int] = []
    form = form_for(encode_row)
    rows = list(rows)
    for i, row in enumerate(rows):
        check_row(row, i, form)
        where = _name_of(row, i)
        try:
            with LOCK:  # two threads cannot use a fast tokenizer at once
                example = _plain(encode_row(row))
        except KeyError as error:
            missing = f"{where}: KeyError {error}. The row has the fields {list(row)}. {form.advice}"
            raise ValueError(missing.rstrip()) from error
        except MissingFieldError as error:
            raise ValueError(f"{where}: {error} {form.advice}".rstrip()) from error
        except MissingValueError as error:
            raise ValueError(f"{where}: {error}{count_of_gaps(rows, error.name)}") from error
        except (ValueError, TypeError) as error:
            message = error.args[0] if error.args else error
            raise ValueError(f"{where}: {message}") from error
        _check_example(example, where)
        if example.target is None:
            unanswered.append(i)
        examples.append(example)
    if need_target and unanswered:
        raise ValueError(_without_answer(rows, unanswered))
    if not examples:
        raise ValueError("The data set has no rows.")
    if cut := sum(example.is_cut for example in examples):
        logger.warning(
            "%d of %d rows were longer than max_length and lost a part of their text. "
            "To keep it, increase max_length of the task%s.",
            cut,
            len(examples),
            ", or read such texts in windows: windows='logits'" if form.has_windows else "",
        )
    note_columns(rows, form, examples)
    return examples


def _name_of(row: Row, i: int) -> str:
    return f"Row {i}" + (f" (id {row['id']!r})" if "id" in row else "")


def _without_answer(rows: Sequence[Row], unanswered: Sequence[int]) -> str:
    """Say which rows have no answer, and what to do."""
    first = unanswered[0]
    count = f" {rows_in_words(unanswered, len(rows))} have none." if len(unanswered) > 1 else ""
    return (
        f"{_name_of(rows[first], first)} has no answer, but training and the likelihood need one.{count} The row has "
        f"the fields {list(rows[first])}. Add the answer in the field that the task reads, or leave these rows out."
    )


def _plain(example: Example) -> Example:
    """Give an example a Python number as its target, or None where the row has no answer."""
    if isinstance(example.target, list | tuple):
        return example
    target = None if is_missing(example.target) else plain(example.target)
    return example if target is example.target else replace(example, target=target)


def _check_example(example: Example, where: str) -> None:
    if len(example) == 0:
        raise ValueError(f"{where} is empty: its text gives no tokens. Give the row a text, or leave it out.")
    if example.target is None or isinstance(example.target, list | tuple):
        return
    if not isinstance(example.target, numbers.Real):
        raise TypeError(f"{where}: the answer {example.target!r} is not a number. The task must encode it as one.")
    if not math.isfinite(example.target):
        raise ValueError(f"{where}: the answer {example.target} is not finite. Correct the row, or leave it out.")


@known_arguments
def check_tokens(examples: Sequence[Example], llm: Any, pad_token_id: int, *, window_length: int | None = None) -> None:
    """Check that ``llm`` has an embedding for every token and a position for the longest example.

    Without this check, the forward pass would fail. On a GPU, that breaks all later CUDA calls.

    Args:
        examples: Tokenized rows.
        llm: The LLM. A module without input embeddings or without a table of positions passes that part of the check.
        pad_token_id: Token that fills shorter rows.
        window_length: Largest number of tokens that the LLM reads at a time. None: it reads whole examples.

    Raises:
        ValueError: A token has no embedding, or an example is longer than the table of positions.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from scalabl_pyro.data import Example, check_tokens
        >>> config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_attention_heads=2)
        >>> llm = LlamaForCausalLM(config)
        >>> check_tokens([Example({"input_ids": [3, 9]})], llm, pad_token_id=0)
    """
    _check_lengths(examples, llm, window_length)
    embeddings = input_embeddings(llm)
    size = getattr(embeddings, "num_embeddings", None)
    if size is None:
        return
    if not 0 <= pad_token_id < size:
        raise ValueError(
            f"The pad token is {pad_token_id}, but the model has embeddings for 0 to {size - 1} only: use a token that "
            "it knows, tokenizer.pad_token = tokenizer.eos_token, or call model.resize_token_embeddings()."
        )
    for i, example in enumerate(examples):
        unknown = [token for token in example.inputs["input_ids"] if not 0 <= token < size]
        if unknown:
            raise ValueError(
                f"Row {i} has the token {unknown[0]}, but the model has embeddings for 0 to {size - 1} only: load the "
                "model's own tokenizer, or call model.resize_token_embeddings() after adding tokens."
            )


def _check_lengths(examples: Sequence[Example], llm: Any, window_length: int | None) -> None:
    """Check that no example is longer than the table of positions. Warn if one is longer than in the LLM's training."""
    if not examples:
        return
    i = max(range(len(examples)), key=lambda i: len(examples[i]))
    length, limit, trained = len(examples[i]), position_limit(llm), trained_positions(llm)
    length, what = (length, "") if window_length is None else (min(length, window_length), " in a window")
    if limit is not None and length > limit:
        raise ValueError(
            f"Row {i} has {length} tokens{what}, but the model has positions for {limit} tokens only. Pass "
            f"max_length={limit} or less to the task, which cuts longer texts, or shorten the rows."
        )
    if trained is not None and length > trained:
        logger.warning(
            "Row %d has %d tokens%s, but the model was made for %d tokens, so its output may be poor. Pass "
            "max_length=%d to the task to cut longer texts.",
            i,
            length,
            what,
            trained,
            trained,
        )
