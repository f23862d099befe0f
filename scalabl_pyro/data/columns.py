"""What the columns of a table hold: texts, classes, numbers or lists, as a task would read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .._values import is_code, is_missing, number, plain
from .labels import UNLABELED, ClassIndex, ClassName

#: Names of columns that hold no answer and no text.
IDENTIFIERS = ("id", "idx", "index", "row", "row_id", "uid", "guid", "unnamed: 0", "__index_level_0__")
#: A column of texts has classes if it has at most this many, or this share of the rows; else its texts are free.
FEW_TEXTS, SHARE_OF_CLASSES = 20, 0.2
#: A column of whole numbers has classes if it has at most so many different ones.
FEW_NUMBERS = 20

Kind = Literal["classes", "texts", "truth values", "whole numbers", "numbers", "lists", "nothing", "other"]


@dataclass(frozen=True)
class Column:
    """Values of one field over all rows.

    Attributes:
        name: Name of the field.
        values: Its values that are not missing, as Python values.
        missing: Number of rows without a value.
        is_numbers_as_text: Whether numbers are written as texts, as in ``"2.5"``.

    Example:
        >>> Column("label", ("yes", "no", "yes"), missing=1).classes
        ('no', 'yes')
    """

    name: str
    values: tuple[Any, ...]
    missing: int
    is_numbers_as_text: bool = False

    @property
    def kind(self) -> Kind:
        """What the values are. Texts that are few for the number of rows are classes."""
        values = self.values
        if not values:
            return "nothing"
        if all(isinstance(v, ClassIndex) for v in values):
            return "classes"
        if all(isinstance(v, bool) for v in values):
            return "truth values"
        if all(isinstance(v, str) for v in values):
            most = max(FEW_TEXTS, SHARE_OF_CLASSES * len(values)) if len(values) > FEW_TEXTS else len(values) - 1
            return "classes" if len(set(values)) <= most else "texts"
        found = [number(v) for v in values]
        if all(v is not None for v in found):
            return "whole numbers" if all(float(v).is_integer() for v in found if v is not None) else "numbers"
        return "lists" if all(isinstance(v, list | tuple | np.ndarray) for v in values) else "other"

    @property
    def is_text(self) -> bool:
        """Whether all values are texts and not numbers."""
        return bool(self.values) and all(isinstance(v, str) for v in self.values)

    @property
    def length(self) -> float:
        """Mean length of the texts, characters."""
        return sum(len(v) for v in self.values if isinstance(v, str)) / max(len(self.values), 1)

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """Different values in their order; those of a ``ClassLabel`` in the order of the data set.

        Lists give the values that they contain.
        """
        first = self.values[0] if self.values else None
        if isinstance(first, ClassIndex):
            return tuple(first.names)
        values = [v for row in self.values for v in row] if self.kind == "lists" else list(self.values)
        if all(isinstance(v, ClassIndex) for v in values) and values:
            return tuple(values[0].names)
        values = [plain(v) for v in values]
        if self.kind == "whole numbers":
            values = [int(v) for v in values if v != UNLABELED or self._has_class_below_zero]
        return tuple(sorted(set(values)))

    @property
    def _has_class_below_zero(self) -> bool:
        """Whether -1 is a number like the others: there are other negative ones, or 1 is the only other one."""
        return min(self.values) < UNLABELED or set(self.values) == {-1, 1}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the columns of a table by name. Columns of identifiers are left out.

    Args:
        rows: The rows, at least one.

    Example:
        >>> columns = columns_of([{"id": 1, "note": "the sky", "price": "2.5"}, {"note": "grass", "price": None}])
        >>> {name: (column.kind, column.missing) for name, column in columns.items()}
        {'note': ('texts', 0), 'price': ('numbers', 1)}
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {}
    for name in names:
        if str(name).casefold() in IDENTIFIERS:
            continue
        values = [row.get(name) for row in rows]
        known = tuple(v if isinstance(v, ClassIndex) else plain(v) for v in values if not _is_gap(v))
        numbers = [number(v, from_text=True) for v in known]
        as_text = bool(known) and None not in numbers and all(isinstance(v, str) and not is_code(v) for v in known)
        found[name] = Column(
            name, tuple(numbers) if as_text else known, len(values) - len(known), is_numbers_as_text=as_text
        )
    return found


def _is_gap(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())
