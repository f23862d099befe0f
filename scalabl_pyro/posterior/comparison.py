"""Ranking of posteriors of one data set, with measures of how reliable the numbers are."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._arguments import check_role, known_arguments
from .._errors import check_count
from ..analysis.checks import check_chains
from ..analysis.finding import Finding
from ..analysis.psis import LOO, LogWeights, good_k
from .posterior import Posterior

logger = logging.getLogger(__name__)


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
    """Compare posteriors, the best first.

    Two guides of the same factors, prior and task approximate the same exact posterior: they have the same ``target``.
    LOO is then the same number for both, and differences between its estimates are errors of the estimates. So
    posteriors of one target are ranked by the ELBO, which is larger the closer a guide is to the posterior. MCMC chains
    have no ELBO. They stand first if they agree (R-hat below 1.1), else last. Different targets are ranked by the
    ``elpd_loo`` of their first posterior. Posteriors that are a single point have no LOO. They stand at the end.

    Args:
        posteriors: Posteriors by name, or a list of them, which are named by guide and prior.
        data: Training rows, or a random part of them, the same for all posteriors.
        num_draws: Number of draws behind LOO, k-hat and the ELBO.
        num_data: Size of the training set, if ``data`` is a part of it; LOO stays that of the part.
        seed: Seed of the draws.
        batch_size: Number of rows per forward pass.

    Returns:
        One row per posterior, with columns ``elpd_loo`` and ``se`` (nats), ``difference`` to the first row and its
        standard error ``dse`` (NaN within the target of the first row), ``p_loo``, ``elbo``, ``pareto_k`` of the
        weights p / q, its threshold ``good_k`` for this number of draws (as in ArviZ), ``bad_rows``, ``target``, and
        ``warning``. ``bad_rows`` is the share of training rows whose own Pareto k is above ``good_k``; their LOO is
        unreliable. ``target`` is a letter. ``warning`` says why you cannot rely on a posterior; it is empty if you can.
        Each warning is logged, too.

    Raises:
        TypeError: If an entry is not a posterior.
        ValueError: If no posterior is given, if the training sets have different sizes, or if a number is not a whole
            number from 1 on.

    Example:
        >>> scalabl_pyro.compare({"normal": first, "flow": second}, train_data)
    """
    check_count(num_draws=num_draws, batch_size=batch_size)
    named = _named(posteriors)
    targets = _targets(named)
    rows: dict[str, dict[str, Any]] = {}
    pointwise, places = {}, {}
    for name, posterior in named.items():
        weights = posterior.log_weights(data, num_draws=num_draws, num_data=num_data, seed=seed, batch_size=batch_size)
        loo = _loo(weights)
        chains = _chains(posterior)
        pointwise[name] = loo.elpd_i
        rows[name] = _figures(weights, loo) | {"target": targets[name], "warning": _warning(weights, loo, chains)}
        places[name] = _place(weights, chains)
        if rows[name]["warning"]:
            logger.warning("compare(): %s: %s", name, rows[name]["warning"])
    frame = pd.DataFrame.from_dict(rows, orient="index").loc[_ranked(rows, places)]
    best = frame.index[0]
    gaps = {name: pointwise[best] - pointwise[name] for name in frame.index}
    for name in frame.index[1:]:
        if targets[name] == targets[best]:  # there is no difference, only error
            gaps[name] = np.full_like(gaps[name], np.nan)
    frame.insert(2, "difference", [float(gaps[name].sum()) for name in frame.index])
    frame.insert(3, "dse", [float(np.sqrt(len(gaps[name]) * gaps[name].var())) for name in frame.index])
    return frame


def _figures(weights: LogWeights, loo: LOO) -> dict[str, Any]:
    k, threshold, _ = weights.pareto_k()
    return {
        "elpd_loo": loo.elpd,
        "se": loo.se,
        "p_loo": loo.p,
        "elbo": weights.elbo(),
        "pareto_k": k,
        "good_k": good_k(len(weights.log_likelihood)) if np.isnan(threshold) else threshold,
        "bad_rows": loo.bad_rows,
    }


def _warning(weights: LogWeights, loo: LOO, chains: Finding | None) -> str:
    """Say why the figures of a posterior are not to be relied on; empty if they are."""
    if np.isnan(loo.elpd):
        return "a point has no LOO"
    k, threshold, _ = weights.pareto_k()
    found = []
    if weights.log_q is not None and not k <= threshold:
        found.append(f"pareto_k {k:.2f} is above {threshold:.2f}: the weights p / q are unreliable, and LOO with them")
    if chains is not None and chains.severity != "ok":
        found.append(
            "not known to be converged: it has no R-hat" if np.isnan(chains.value) else f"r_hat is {chains.value:.2f}"
        )
    if weights.log_q is None and chains is None:
        found.append("no density, hence no ELBO: LOO takes the draws for draws of the exact posterior")
    if loo.bad_rows > 0:
        found.append(f"LOO of {loo.bad_rows:.0%} of the rows is unreliable")
    if loo.p < 0:
        found.append("p_loo is negative, which it cannot be: LOO is unreliable")
    return "; ".join(found)


def _chains(posterior: Posterior) -> Finding | None:
    """Check the agreement of MCMC chains; None if the posterior holds none."""
    chains = posterior.guide.chains()
    return None if chains is None else check_chains(chains["s"].double().numpy(), "chain")[0]


def _place(weights: LogWeights, chains: Finding | None) -> float:
    """Give the place among posteriors of one target: the ELBO, or an infinite value for draws without a density."""
    if weights.log_q is not None:
        return float(np.nan_to_num(weights.elbo(), nan=-np.inf))
    converged = chains is not None and not np.isnan(chains.value) and chains.severity != "error"
    return float("inf") if converged else float("-inf")


def _ranked(rows: Mapping[str, Mapping[str, Any]], places: Mapping[str, float]) -> list[str]:
    """Order names: targets by the LOO of their first posterior, posteriors of a target by place, points at the end."""
    order = sorted((name for name in rows if not np.isnan(rows[name]["elpd_loo"])), key=lambda name: -places[name])
    first: dict[str, float] = {}
    for name in order:
        first.setdefault(rows[name]["target"], rows[name]["elpd_loo"])
    order.sort(key=lambda name: (-first[rows[name]["target"]], rows[name]["target"]))  # stable: keeps the places
    return [*order, *(name for name in rows if name not in order)]


def _targets(named: Mapping[str, Posterior]) -> dict[str, str]:
    """Give posteriors with equal factors, heads, prior and task the same letter (A, B, ..., then numbers)."""
    found: list[Posterior] = []
    targets = {}
    for name, posterior in named.items():
        index = next((i for i, other in enumerate(found) if _have_same_target(posterior, other)), len(found))
        if index == len(found):
            found.append(posterior)
        targets[name] = chr(ord("A") + index) if index < 26 else str(index)
    return targets


def _have_same_target(first: Posterior, second: Posterior) -> bool:
    def described(posterior: Posterior) -> list[Any]:
        parts = (posterior.prior, posterior.task)
        options = [getattr(posterior.task, name, None) for name in posterior.task.options]
        return [*map(type, parts), repr(posterior.prior.options()), repr(options)]

    def tensors(posterior: Posterior) -> dict[str, Tensor]:
        heads = {f"heads.{k}": head for k, head in posterior.heads.items()}
        modules = {"prior": posterior.prior, "task": posterior.task, **heads}
        states = {f"{k}.{n}": v for k, module in modules.items() for n, v in module.state_dict().items()}
        return states | {f"{i}.{j}": v for i, pair in enumerate(posterior.factors) for j, v in enumerate(pair)}

    if first.adapter is not second.adapter or described(first) != described(second):
        return False
    one, other = tensors(first), tensors(second)
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


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
