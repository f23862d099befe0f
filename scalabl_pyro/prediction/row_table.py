"""The predicted rows beside what was predicted: a table that one can read, sort and send to somebody."""

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._errors import is_number
from ..data.rows import read_rows


def beside_rows(found: pd.DataFrame, data: Any) -> pd.DataFrame:
    """Put the columns of the rows before the columns of their prediction.

    Args:
        found: One line per row, N lines.
        data: The N rows, as they were given to ``predict``; None leaves the table as it is.

    Returns:
        N lines. The index is that of ``data`` if it is a DataFrame.

    Raises:
        ValueError: ``data`` has another number of rows, or a column with the name of a column of ``found``.
    """
    if data is None:
        return found
    rows = data if isinstance(data, pd.DataFrame) else pd.DataFrame(read_rows(data, split="test"))
    if len(rows) != len(found):
        raise ValueError(f"data has {len(rows)} rows, but {len(found)} rows were predicted: pass the same rows.")
    if twice := [str(name) for name in rows.columns if name in found.columns]:
        raise ValueError(
            f"data has a column {twice[0]!r}, and so has the table of predictions: rename that of data, for instance "
            f"with data.rename(columns={{{twice[0]!r}: {'given_' + twice[0]!r}}})."
        )
    return pd.concat([rows, found.set_index(rows.index)], axis=1)


def needs_review(
    uncertainty: NDArray[np.floating], limit: float | None, *, largest: float = math.inf
) -> dict[str, NDArray[np.bool_]]:
    """Return the column ``needs_review``: whether an uncertainty is above a limit. No limit gives no column.

    Raises:
        ValueError: The limit is not a number, or it is NaN, or above ``largest``, so that no row could need a review.
    """
    if limit is None:
        return {}
    if not is_number(limit) or np.isnan(limit):
        raise ValueError(f"review_above={limit!r} must be a number: rows with a larger uncertainty need a review.")
    if limit > largest:
        raise ValueError(
            f"review_above={limit!r} is above {largest:g}, the largest doubt that a row can have, so no row would need "
            f"a review: give a limit below {largest:g}."
        )
    return {"needs_review": uncertainty > limit}
