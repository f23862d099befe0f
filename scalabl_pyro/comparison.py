"""Rank posteriors of one data set: which prior and guide predict best, and how far can the numbers be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .diagnostics import LOO, LogWeights
from .posterior import Posterior


def compare(
    posteriors: Mapping[str, Posterior] | Sequence[Posterior],
    data: Any,
    *,
    num_draws: int = 200,
    num_data: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> pd.DataFrame:
    """A line for each posterior, best expected log predictive density first.

    Args:
        posteriors: by name, or a list (named by guide and prior).
        data: the training rows, or a random part of them, the same for all.
        num_draws: behind LOO, k-hat and the ELBO.
        num_data: size of the training set, if ``data`` is a part of it; LOO stays that of the part.
        seed: of the draws.
        batch_size: rows a pass.

    Returns:
        Columns ``elpd_loo`` and ``se`` (nats), ``difference`` to the best and its standard error ``dse``, ``p_loo``,
        ``elbo``, ``pareto_k``, ``bad_rows`` (share of rows whose LOO is unreliable).
    """
    if not isinstance(posteriors, Mapping):
        posteriors = {f"{i}: {p.describe()}": p for i, p in enumerate(posteriors)}
    if not posteriors:
        raise ValueError("There is nothing to compare: pass at least one posterior.")
    rows, pointwise = {}, {}
    for name, posterior in posteriors.items():
        weights = posterior.log_weights(data, num_draws=num_draws, num_data=num_data, seed=seed, batch_size=batch_size)
        loo = _loo(weights)
        pointwise[name] = loo.elpd_i
        k, _, _ = weights.pareto_k()
        rows[name] = {
            "elpd_loo": loo.elpd,
            "se": loo.se,
            "p_loo": loo.p,
            "elbo": weights.elbo(),
            "pareto_k": k,
            "bad_rows": loo.bad_rows,
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").sort_values("elpd_loo", ascending=False)
    best = pointwise[frame.index[0]]
    gaps = {name: best - values for name, values in pointwise.items()}
    frame.insert(2, "difference", [float(gaps[name].sum()) for name in frame.index])
    frame.insert(3, "dse", [float(np.sqrt(len(best) * gaps[name].var(ddof=1))) for name in frame.index])
    return frame


def _loo(weights: LogWeights) -> LOO:
    """LOO, or NaN for a point, which has none."""
    try:
        return weights.loo()
    except ValueError:
        if np.ptp(weights.log_likelihood, axis=0).max() > 0:
            raise
    nothing = np.full(weights.log_likelihood.shape[1], np.nan)
    return LOO(float("nan"), float("nan"), float("nan"), nothing, nothing, float("nan"))
