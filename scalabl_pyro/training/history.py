"""The history of a training: its columns, the row of a step, and its rows read back from a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batch import Batch
from ..storage.tensor_files import check_keys
from .messages import StepStatistics

#: Columns of the history.
COLUMNS = ("step", "loss", "nll", "kl", "kl_weight", "grad_norm", "lr", "seconds", "skipped")
#: Further column, where the answers are texts.
PER_TOKEN = "nll_per_token"
#: Further column, where held-out rows are scored: whether the posterior holds the state after this step.
KEPT = "kept"


class Pending(NamedTuple):
    """A step whose statistics the host has not read yet."""

    step: int
    batch: Batch
    kl_weight: float
    rate: float
    seconds: float
    statistics: Tensor


def row_of(taken: Pending, statistics: StepStatistics, *, num_data: int, skipped: int) -> dict[str, float]:
    """Build the history row of a step.

    Args:
        taken: The step.
        statistics: What the host has read of it.
        num_data: Number of rows of the data set.
        skipped: Number of steps so far that changed no parameter.
    """
    return {
        "step": taken.step,
        "loss": statistics.loss,
        "nll": statistics.nll,
        "kl": kl_of(taken, statistics, num_data),
        "kl_weight": taken.kl_weight,
        "grad_norm": statistics.grad_norm,
        "lr": taken.rate,
        "seconds": taken.seconds,
        "skipped": skipped,
    }


def kl_of(taken: Pending, statistics: StepStatistics, num_data: int) -> float:
    """Compute the KL of a step without its weight, nats per data set. NaN if the weight is 0."""
    return statistics.weighted_kl * num_data / taken.kl_weight if taken.kl_weight else float("nan")


def rows_of(saved: Mapping[str, Tensor], columns: Sequence[str]) -> list[dict[str, float]]:
    """Build a history from its columns.

    Raises:
        ValueError: The columns differ in length, or step counts are not finite.
    """
    check_keys("The saved history", set(saved), set(columns))
    table = {name: saved[name] for name in columns}
    if any(column.dim() != 1 or len(column) != len(table["step"]) for column in table.values()):
        raise ValueError("the columns of the saved history differ in length")
    rows = [dict(zip(table, row, strict=True)) for row in zip(*(c.tolist() for c in table.values()), strict=True)]
    counted = ("step", "skipped")
    if not all(((table[name] >= 0) & torch.isfinite(table[name])).all() for name in counted if table):
        raise ValueError("the saved history has steps that are not finite, or negative")
    return [row | {name: int(row[name]) for name in counted} for row in rows]
