"""Scores of a prediction: the columns of the quality benchmark."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import scalabl_pyro as sp
from scalabl_pyro import metrics
from scalabl_pyro.baselines.temperature import apply_temperature, fit_temperature
from scalabl_pyro.prediction.predict import Prediction

COLUMNS = ("accuracy", "nll", "ece", "brier", "adaptive_ece", "error_auroc", "aurc")


def scores(prediction: Prediction) -> dict[str, float]:
    """Compute the metrics of the averaged probabilities."""
    found = prediction.metrics().loc["value"]
    return {name: float(found[name]) for name in COLUMNS}


def scaled_scores(prediction: Prediction, validation: Prediction) -> dict[str, float]:
    """Fit a temperature on validation, and compute NLL, ECE and Brier score with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sp.ScalaBLWarning)  # The column shows a temperature at the limit of its range.
        temperature = fit_temperature(validation)
    found = scores(apply_temperature(prediction, temperature))
    return {"temperature": temperature, **{f"ts_{name}": found[name] for name in ("nll", "ece", "brier")}}


def ood_scores(inside: Prediction, outside: Prediction) -> dict[str, float]:
    """Compute how well each uncertainty detects rows of another data set, and score these rows if they have answers."""
    found = {
        "auroc_max_prob": metrics.ood_auroc(1 - inside.probs.max(1), 1 - outside.probs.max(1)),
        "auroc_entropy": metrics.ood_auroc(inside.total, outside.total),
        "auroc_mutual_information": metrics.ood_auroc(inside.epistemic, outside.epistemic),
    }
    if outside.num_draws < 2:
        found["auroc_mutual_information"] = float("nan")  # A single draw cannot disagree with itself.
    if outside.target is not None:
        found |= scores(outside)
    return found


def keep(path: Path, prediction: Prediction, outside: Mapping[str, Prediction]) -> None:
    """Write averaged probabilities and answers to a compressed file.

    Args:
        path: File to write.
        prediction: Prediction of the test rows.
        outside: Predictions of other data sets by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"ood_{name}": p.probs.astype(np.float32) for name, p in outside.items()}
    temporary = path.with_suffix(".tmp.npz")
    target = np.asarray(prediction.target, dtype=np.int16)
    np.savez_compressed(temporary, probs=prediction.probs.astype(np.float32), target=target, **arrays)
    temporary.replace(path)


def kept(path: Path) -> Prediction:
    """Read a prediction that :func:`keep` wrote. It has one draw."""
    with np.load(path) as arrays:
        probs, target = arrays["probs"].astype(np.float64), arrays["target"].astype(np.int64)
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs / probs.sum(1, keepdims=True))[None]
    return Prediction(log_probs, target, tuple(map(str, range(probs.shape[1]))))
