"""Splits a table into two parts in which each class has the same share."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._arguments import known_arguments
from .._errors import check_count, nearest
from .._values import is_missing, number, shown
from .labels import ClassIndex
from .rows import Row, read_rows


@known_arguments
def stratified_split(
    data: Any, *, by: str, share: float = 0.2, seed: int = 0, split: str = "train"
) -> tuple[list[Row], list[Row]]:
    """Split rows into two parts in which each class has nearly the same share.

    Each class with two rows or more has at least one row in both parts. Rows without a class count as a class of their
    own.

    Args:
        data: Rows in any form that :func:`read_rows` takes.
        by: Name of the field of the class.
        share: Share of the rows in the second part, between 0 and 1.
        seed: Seed of the choice.
        split: Split of a hub data set.

    Returns:
        The two parts, each in the order of the data, for instance for training and for a check.

    Raises:
        ValueError: No row has the field, ``share`` is not between 0 and 1, or ``seed`` is not a whole number from 0 on.

    Example:
        >>> from scalabl_pyro.data import stratified_split
        >>> rows = [{"text": "a", "label": label} for label in "xxxxxxxxyy"]
        >>> train, check = stratified_split(rows, by="label", share=0.5)
        >>> "".join(row["label"] for row in check)
        'xxxxy'
    """
    if not 0 < (number(share) or 0.0) < 1:
        raise ValueError(f"share={shown(share)}: expected a number between 0 and 1, the share of the second part.")
    check_count(seed=seed, least=0)
    rows = read_rows(data, split=split)
    if not any(by in row for row in rows):
        raise ValueError(f"by={by!r}: the rows have no such field. {nearest(by, map(str, rows[0]))}")
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_key(row, by), []).append(i)
    generator = np.random.default_rng(seed)
    chosen: set[int] = set()
    for members in groups.values():
        count = round(share * len(members))
        count = min(max(count, 1), len(members) - 1) if len(members) > 1 else 0
        chosen |= {members[i] for i in generator.permutation(len(members))[:count].tolist()}
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _key(row: Mapping[str, Any], by: str) -> Any:
    value = row.get(by)
    return "missing" if is_missing(value) else ("class", int(value) if isinstance(value, ClassIndex) else str(value))
