"""The command ``predict``: a table of rows becomes a table of predictions."""

from pathlib import Path
from typing import Any

import pandas as pd

from ..data.rows import read_rows
from ..prediction.result import Prediction
from .loading import load_posterior
from .tables import check_table_name, write_table
from .terminal import say, say_json


def predict(
    path: Path,
    data: str,
    model: str,
    out: Path | None,
    num_draws: int,
    seed: int,
    batch_size: int,
    device: str,
    class_probs: bool,
    review_above: float | None,
    as_json: bool,
) -> int:
    """Predict the rows of a table, and write or print them with their predictions.

    Args:
        path: Directory of the saved posterior.
        data: File of the rows.
        model: Base model.
        out: File of the result; None prints it.
        num_draws: Number of draws.
        seed: Seed of the draws.
        batch_size: Rows per forward pass.
        device: Device of the model.
        class_probs: Whether to add a column per class.
        review_above: Limit of the doubt above which a row needs a review.
        as_json: Whether to print JSON.

    Returns:
        0.
    """
    check_table_name(out)
    rows = read_rows(data, split="test")
    posterior = load_posterior(path, model, device)
    found = posterior.predict(rows, num_draws=num_draws, seed=seed, batch_size=batch_size)
    options: dict[str, Any] = {"class_probs": class_probs} if isinstance(found, Prediction) else {}
    frame = found.to_frame(rows, review_above=review_above, **options)
    if out is not None:
        write_table(frame, out)
    _tell(frame, out, as_json)
    return 0


def _tell(frame: pd.DataFrame, out: Path | None, as_json: bool) -> None:
    review = int(frame["needs_review"].sum()) if "needs_review" in frame else None
    if as_json:
        whole = {"rows": len(frame), "needs_review": review, "out": None if out is None else str(out)}
        say_json(whole if out is not None else whole | {"predictions": frame.to_dict("records")})
        return
    if out is None:
        say(frame.to_string(max_colwidth=40, float_format=lambda value: f"{value:.3f}"))
    else:
        say(f"{len(frame)} rows predicted: {out}")
    if review is not None:
        say(f"{review} of {len(frame)} rows need a review.")
