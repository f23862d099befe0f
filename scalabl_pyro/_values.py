"""Plain Python values from what tables, arrays and tensors hold: integer, number, text, and missing values."""

import math
import numbers
import re
from decimal import Decimal
from typing import Any

import numpy as np
import torch

#: Digits behind a leading zero, or more than 15 digits.
_CODE = re.compile(r"\s*[+-]?(0\d|\d{16,}\s*$)")


def plain(value: Any) -> Any:
    """Return the Python value of a NumPy or torch scalar, and any other value as it is.

    Args:
        value: Any value. Arrays and tensors with a dimension are not scalars, even if they hold one number.

    Example:
        >>> plain(np.float32(0.5)), plain(torch.tensor(3)), plain("text")
        (0.5, 3, 'text')
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        item = value.item()
        # Some NumPy scalars (masked, long double, missing dates) have no Python value of their own.
        return value if isinstance(item, np.generic) else item
    return value


def is_missing(value: Any) -> bool:
    """Whether a value stands for "nothing": None, NaN, ``pandas.NA``, ``NaT``, or a masked entry.

    Example:
        >>> [is_missing(value) for value in (None, float("nan"), np.float32("nan"), 0, "")]
        [True, True, True, False, False]
    """
    if value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    value = plain(value)
    return isinstance(value, numbers.Real | Decimal | np.floating) and math.isnan(value)


def integer(value: Any) -> int | None:
    """Return a whole number as an int, or None if the value is none.

    Whole numbers are Python, NumPy and torch integers, and floats without a fraction, because a table column with
    gaps holds 2 as 2.0. Truth values and texts are not whole numbers.

    Example:
        >>> integer(2), integer(np.int64(2)), integer(2.0), integer(2.5), integer(True), integer("2")
        (2, 2, 2, None, None, None)
    """
    value = plain(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    real = float(value) if isinstance(value, numbers.Real | Decimal | np.floating) else math.nan
    return int(value) if real.is_integer() else None


def number(value: Any, *, from_text: bool = False) -> float | None:
    """Return a real number as a float, or None if the value is none. It may be infinite or NaN.

    Args:
        value: Any value. Truth values are not numbers.
        from_text: Whether a text such as ``"2.5"`` counts, as a CSV file holds numbers.

    Example:
        >>> number(np.float32(0.5)), number(torch.tensor(3)), number("2.5"), number("2.5", from_text=True)
        (0.5, 3.0, None, 2.5)
    """
    value = plain(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Real | Decimal | np.floating):
        return float(value)
    if from_text and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def is_code(value: str) -> bool:
    """Whether a text that looks like a number names a thing: it begins with 0, or has more digits than float64 keeps.

    Example:
        >>> [is_code(value) for value in ("007", "1234567890123456789", "0.5", "-3", "note")]
        [True, True, False, False, False]
    """
    return _CODE.match(value) is not None


def text(value: Any) -> str | None:
    """Return a text as a str, or None if the value is none.

    Bytes are read as UTF-8, and numbers are written out. Lists, dicts and other objects are not texts.

    Example:
        >>> text("sky"), text(b"sky"), text(np.int64(3)), text(["the", "sky"])
        ('sky', 'sky', '3', None)
    """
    value = plain(value)
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, str):
        return str(value)
    return str(value) if isinstance(value, numbers.Real | Decimal) else None


def shown(value: Any, *, limit: int = 80) -> str:
    """Return a short repr of a value, with its type where the repr does not show it, for messages.

    Example:
        >>> shown("sky"), shown([1, 2])
        ("'sky'", '[1, 2] (a list)')
    """
    content = repr(value)
    content = content if len(content) <= limit else f"{content[: limit - 3]}..."
    return content if isinstance(value, str | int | float | type(None)) else f"{content} (a {type(value).__name__})"
