"""The history of a training: its columns, and its rows read back from a checkpoint."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..storage.tensor_files import check_keys

#: Columns of the history.
COLUMNS = ("step", "loss", "nll", "kl", "kl_weight", "grad_norm", "lr", "seconds", "skipped")
#: Further column, where the answers are texts.
PER_TOKEN = "nll_per_token"


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
