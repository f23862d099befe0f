"""The command ``predict``: a table of rows becomes a table of predictions."""

from pathlib import Path
from typing import Any

import pandas as pd

from ..prediction.result import Prediction
from ..storage.json_values import records
from .loading import predict_table
from .tables import WRITE, beside, check_name, write_table
from .terminal import say, say_json


def predict(out: Path | None, class_probs: bool, review_above: float | None, as_json: bool, **how: Any) -> int:
    """Predict the rows of a table, and write or print them with their predictions.

    Args:
        out: File of the result; None prints it.
        class_probs: Whether to add a column per class.
        review_above: Limit of the doubt above which a row needs a review.
        as_json: Whether to print JSON.
        how: Arguments of :func:`~scalabl_pyro.cli.loading.predict_table`.

    Returns:
        0.
    """
    check_name(out, WRITE)
    rows, found = predict_table(**how, progress=not as_json)
    options: dict[str, Any] = {"class_probs": class_probs} if isinstance(found, Prediction) else {}
    frame = beside(rows, found.to_frame(review_above=review_above, **options))
    if out is not None:
        write_table(frame, out)
    _tell(frame, out, as_json)
    return 0


def _tell(frame: pd.DataFrame, out: Path | None, as_json: bool) -> None:
    review = int(frame["needs_review"].sum()) if "needs_review" in frame else None
    if as_json:
        whole = {"rows": len(frame), "needs_review": review, "out": None if out is None else str(out)}
        say_json(whole if out is not None else whole | {"predictions": records(frame)})
        return
    if out is None:
        say(frame.to_string(max_colwidth=40, float_format=lambda value: f"{value:.3f}"))
    else:
        say(f"{len(frame)} rows predicted: {out}")
    if review is not None:
        say(f"{review} of {len(frame)} rows need a review.")
