"""Values that JSON can hold, from values of Python, NumPy and pandas."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .._values import is_missing, plain


def json_value(value: Any) -> Any:
    """Return a value that JSON can hold: None for NaN, infinity and what is missing, and a text for other objects.

    Args:
        value: Scalar of Python, NumPy or pandas, or a container of such values.

    Example:
        >>> json_value({"p": float("nan"), "labels": ("red", "blue")})
        {'p': None, 'labels': ['red', 'blue']}
    """
    if isinstance(value, Mapping):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [json_value(inner) for inner in value]
    value = plain(value)
    if is_missing(value) or (isinstance(value, float) and math.isinf(value)):
        return None
    return value if isinstance(value, str | int | float) else str(value)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one dict per line of a table, with values that JSON can hold."""
    return [json_value(line) for line in frame.to_dict("records")]
