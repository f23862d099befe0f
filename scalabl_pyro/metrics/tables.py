"""Tables of several metrics, with bootstrap intervals."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._arguments import known_arguments
from .._errors import check_count
from .._probabilities import as_probabilities
from .arrays import Array, Labels
from .calibration import adaptive_ece, ece
from .intervals import check_level, quantile
from .scores import accuracy, brier, mean_nll, nll
from .selection import aurc, error_auroc

CLASSIFICATION: dict[str, Callable[[Array, Labels], float]] = {
    "accuracy": accuracy,
    "nll": nll,
    "ece": ece,
    "adaptive_ece": adaptive_ece,
    "brier": brier,
    "error_auroc": error_auroc,
    "aurc": aurc,
}


#: Metrics without bootstrap intervals. Noise alone makes a calibration error positive, and a resample adds noise, so
#: nearly all resamples lie above the value: a percentile interval would not contain it.
WITHOUT_INTERVAL = ("ece", "adaptive_ece")


@known_arguments
def classification_report(
    probs: Array,
    labels: Labels,
    *,
    log_likelihood: Array | None = None,
    bootstrap: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute all metrics of a classification.

    Args:
        probs: (N, C) probabilities.
        labels: (N,) class indices.
        log_likelihood: (N,) log probability of each label, nats, for an NLL that holds where probabilities are too
            small for floats; None for the logarithm of ``probs``.
        bootstrap: Number of resamples of the rows for percentile intervals (Efron, 1979); 0 for none.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the resampling.

    Returns:
        Row ``value``, and with ``bootstrap`` also ``low`` and ``high``; one column per metric. The bounds of ``ece``
        and ``adaptive_ece`` are NaN: both are biased upward, and more so in a resample, so that a percentile interval
        would lie above the value itself.

    Raises:
        ValueError: If the shapes, the probabilities or the labels are wrong, or if an option is out of range.
    """
    probs, labels = as_probabilities(probs, labels)

    def scores(rows: NDArray[np.integer] | slice) -> dict[str, float]:
        values = {name: fn(probs[rows], labels[rows]) for name, fn in CLASSIFICATION.items()}
        if log_likelihood is not None:
            values["nll"] = mean_nll(log_likelihood[rows])
        return values

    table = report(scores, len(labels), bootstrap=bootstrap, level=level, seed=seed)
    table.loc[table.index != "value", list(WITHOUT_INTERVAL)] = np.nan
    return table


@known_arguments
def report(
    scores: Callable[[Any], dict[str, float]], num_rows: int, *, bootstrap: int = 0, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Score all rows, and resamples of the rows for percentile intervals.

    Args:
        scores: Function from row indices (or a slice) to metrics by name.
        num_rows: Number N of rows.
        bootstrap: Number of resamples (Efron, 1979); 0 for none.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the resampling.

    Returns:
        Row ``value``, and with ``bootstrap`` also ``low`` and ``high``; one column per metric.

    Raises:
        ValueError: If ``bootstrap`` is not a whole number from 0 on, or if ``level`` is not between 0 and 1.
    """
    check_count(bootstrap=bootstrap, least=0)
    check_level(level)
    table: dict[str, Any] = {"value": scores(slice(None))}
    if bootstrap:
        picks = np.random.default_rng(seed).integers(num_rows, size=(bootstrap, num_rows))
        resamples = pd.DataFrame([scores(rows) for rows in picks])
        tails = (("low", (1 - level) / 2), ("high", (1 + level) / 2))
        table |= {name: {k: quantile(resamples[k].to_numpy(), p) for k in resamples} for name, p in tails}
    return pd.DataFrame.from_dict(table, orient="index")
