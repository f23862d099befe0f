"""Ranking of posteriors of one data set by predictive density, with measures of how reliable the numbers are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .._arguments import check_role, known_arguments
from .._errors import check_count
from ..analysis.psis import LOO, LogWeights, good_k
from .posterior import Posterior


@known_arguments
def compare(
    posteriors: Mapping[str, Posterior] | Sequence[Posterior],
    data: Any,
    *,
    num_draws: int = 200,
    num_data: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Compare posteriors, best expected log predictive density first.

    Args:
        posteriors: Posteriors by name, or a list of them, which are named by guide and prior.
        data: Training rows, or a random part of them, the same for all posteriors.
        num_draws: Number of draws behind LOO, k-hat and the ELBO.
        num_data: Size of the training set, if ``data`` is a part of it; LOO stays that of the part.
        seed: Seed of the draws.
        batch_size: Number of rows per forward pass.

    Returns:
        One row per posterior, with columns ``elpd_loo`` and ``se`` (nats), ``difference`` to the best and its standard
        error ``dse``, ``p_loo``, ``elbo``, ``pareto_k`` of the weights p / q, its threshold ``good_k`` for this number
        of draws (as in ArviZ), and ``bad_rows``, the share of rows whose own Pareto k is above ``good_k``, so that
        their LOO is unreliable.

    Raises:
        TypeError: If an entry is not a posterior.
        ValueError: If there is no posterior, if the training sets have different sizes, or if a number is not a whole
            number from 1 on.

    Example:
        >>> scalabl_pyro.compare({"normal": first, "flow": second}, train_data)
    """
    check_count(num_draws=num_draws, batch_size=batch_size)
    rows, pointwise = {}, {}
    for name, posterior in _named(posteriors).items():
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
            "good_k": good_k(num_draws),
            "bad_rows": loo.bad_rows,
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").sort_values("elpd_loo", ascending=False)
    best = pointwise[frame.index[0]]
    gaps = {name: best - values for name, values in pointwise.items()}
    frame.insert(2, "difference", [float(gaps[name].sum()) for name in frame.index])
    frame.insert(3, "dse", [float(np.sqrt(len(best) * gaps[name].var())) for name in frame.index])
    return frame


def _named(posteriors: Mapping[str, Posterior] | Sequence[Posterior]) -> dict[str, Posterior]:
    """Name the posteriors, and check that they can be compared."""
    if isinstance(posteriors, Mapping):
        given: list[tuple[str | None, Any]] = list(posteriors.items())
    elif isinstance(posteriors, Sequence):
        given = [(None, posterior) for posterior in posteriors]
    else:
        raise TypeError(
            f"compare() got one {type(posteriors).__name__}: pass a list of Posterior, or a mapping from names to them."
        )
    if not given:
        raise ValueError("There is nothing to compare: pass at least one posterior.")
    named: dict[str, Posterior] = {}
    for i, (name, posterior) in enumerate(given):
        check_role(f"Entry {i if name is None else repr(name)}", posterior, "posterior", kind=Posterior)
        named[f"{i}: {posterior.describe()}" if name is None else name] = posterior
    sizes = {name: posterior.provenance.get("num_data") for name, posterior in named.items()}
    if len(set(sizes.values()) - {None}) > 1:
        listed = ", ".join(f"{name!r} {size}" for name, size in sizes.items())
        raise ValueError(
            f"These posteriors were fitted to training sets of different size ({listed} rows). LOO scores the rows "
            "that a posterior was fitted to: fit all to the same rows, or compare predict(test_data).metrics()."
        )
    return named


def _loo(weights: LogWeights) -> LOO:
    """Compute LOO; NaN for a point estimate, which has no LOO."""
    try:
        return weights.loo()
    except ValueError:
        if np.ptp(weights.log_likelihood, axis=0).max() > 0:
            raise
    nothing = np.full(weights.log_likelihood.shape[1], np.nan)
    return LOO(float("nan"), float("nan"), float("nan"), nothing, nothing, float("nan"))
