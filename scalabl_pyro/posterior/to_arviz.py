"""Export of a posterior, and of a prediction, as the groups that ArviZ reads."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import check_role
from .._process.random_state import derive_seed
from .._version import __version__
from ..analysis import arviz_data
from ..prediction.draws import sample_prior_sites
from ..prediction.result import NumericPrediction, Prediction
from ..prediction.room import check_room
from .state import PosteriorState

if TYPE_CHECKING:
    import xarray as xr

#: Copies of the draws that an export makes: those of sampling, and the arrays of its groups by layer.
COPIES_OF_EXPORT = 4


def as_arviz(
    posterior: PosteriorState,
    *,
    num_draws: int,
    seed: int,
    prediction: Prediction | NumericPrediction | None,
    prior: bool,
    prior_prediction: Prediction | NumericPrediction | None,
) -> Any:
    """Export draws and predictions; see :meth:`scalabl_pyro.Posterior.to_arviz`."""
    if num_draws > 0:
        check_room(posterior.guide, num_draws, copies=COPIES_OF_EXPORT, kept=" and their export to ArviZ")
    groups = {"posterior": _posterior_group(posterior, num_draws, seed)}
    if statistics := posterior.guide.statistics():
        groups["sample_stats"] = arviz_data.sample_stats_group({k: v.numpy() for k, v in statistics.items()})
    if prior:
        sites = sample_prior_sites(posterior.prior, max(num_draws, 1), seed=seed)
        arrays = {name: value.unsqueeze(0).numpy() for name, value in sites.items()}
        groups["prior"] = arviz_data.posterior_group(arrays, posterior.subspace)
    if prior_prediction is not None:
        check_role("prior_prediction", prior_prediction, "prediction")
        rows = _compared(prior_prediction)
        groups["prior_predictive"] = arviz_data.per_row_group(
            "label", _replicate(prior_prediction, seed)[:, rows], rows
        )
    if prediction is not None:
        check_role("prediction", prediction, "prediction")
        known = prediction.is_answered
        rows = _compared(prediction)
        replicates = _replicate(prediction, seed)[:, rows]
        groups["posterior_predictive"] = arviz_data.per_row_group("label", replicates, rows)
        if known.any():
            answered = prediction.with_answers()
            groups["log_likelihood"] = arviz_data.per_row_group("label", answered.log_likelihood, rows)
            groups["observed_data"] = arviz_data.observed_group("label", np.asarray(answered.target), rows)
    attrs = {
        "inference_library": "scalabl_pyro",
        "inference_library_version": __version__,
        "inference_method": posterior.provenance.get("method", "SVI"),
        "guide": posterior.guide.options().get("class", type(posterior.guide).__name__),
        "sampling_seed": seed,
        **_flat(posterior.provenance),
    }
    return arviz_data.to_arviz(groups, attrs)


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Attributes that every file format can hold: entries of inner records as ``outer.inner``, other values as JSON."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float):
            flat[prefix + key] = int(value) if isinstance(value, bool) else value
        else:
            flat[prefix + key] = json.dumps(value, default=str)
    return flat


def _posterior_group(posterior: PosteriorState, num_draws: int, seed: int) -> "xr.Dataset":
    chains = posterior.guide.chains()
    # All draws of several chains, or of a sampler that recorded statistics of each, in their order.
    if chains is not None and (len(chains["s"]) > 1 or posterior.guide.statistics()):
        sites = {name: value.numpy() for name, value in chains.items()}
    else:
        sites = {k: v.unsqueeze(0).numpy() for k, v in posterior.sample(num_draws, seed=seed).sites.items()}
    return arviz_data.posterior_group(sites, posterior.subspace)


def _compared(prediction: Prediction | NumericPrediction) -> np.ndarray:
    """Rows of a prediction that the groups hold: where only some rows have answers, these rows.

    ArviZ compares predicted with observed answers row by row.
    """
    known = prediction.is_answered
    return np.flatnonzero(known) if known.any() else np.arange(len(known))


def _replicate(prediction: Prediction | NumericPrediction, seed: int) -> np.ndarray:
    """One simulated answer per draw and row, (S, N)."""
    if isinstance(prediction, NumericPrediction):
        return prediction.replicates
    rng = np.random.default_rng(derive_seed(seed, "answers"))
    gumbel = rng.gumbel(size=prediction.log_probs.shape)  # Gumbel-max trick
    return (prediction.log_probs + gumbel).argmax(-1)
