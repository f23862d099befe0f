"""Checks whether predictions are of use: better than answers that ignore the input, and not the same for all rows."""

import numpy as np

from ..metrics import Array
from ..prediction.mixture import log_mean_exp
from ..prediction.result import NumericPrediction, Prediction
from .finding import Finding

#: Standard errors that a gain must exceed.
NOISE = 2.0
#: Smallest share of rows with another answer than the most frequent one, for which one answer to all rows is a warning.
OTHER_ANSWERS = 0.05


def check_usefulness(prediction: Prediction | NumericPrediction) -> list[Finding]:
    """Check predictions of rows with answers against the class frequencies, or the mean answer, of the same rows.

    The value of ``skill`` is the share of the baseline's NLL (classes) or squared error (numbers) that the predictions
    save: 1 is perfect, 0 is as good as the baseline.
    """
    if prediction.target is None or not isinstance(prediction, Prediction | NumericPrediction):
        return []
    if isinstance(prediction, NumericPrediction):
        answers = np.asarray(prediction.target, dtype=np.float64)
        error = (answers - prediction.mean) ** 2
        return [_skill(error, (answers - answers.mean()) ** 2, "the mean answer", ignores="which ignores the input")]
    loss = -log_mean_exp(prediction.log_likelihood)
    frequencies = _loss_of_frequencies(prediction)
    skill = _skill(loss, frequencies, "the class frequencies", ignores="which ignore the input")
    return [skill, _one_class(prediction)]


def _loss_of_frequencies(prediction: Prediction) -> Array:
    """NLL (N,) of the class frequencies of the rows, shared out among the choices that each row has."""
    target = np.asarray(prediction.target)
    frequencies = np.bincount(target, minlength=prediction.log_probs.shape[-1]) / len(target)
    has_choice: Array = np.any(prediction.log_probs > -np.inf, axis=0)
    has_choice[np.arange(len(target)), target] = True
    return np.log((has_choice * frequencies).sum(1)) - np.log(frequencies[target])


def _skill(loss: Array, baseline: Array, name: str, *, ignores: str) -> Finding:
    level = float(baseline.mean())
    if level <= 0:
        cause = "these rows have the same answer throughout, so no prediction can be better than it."
        return Finding("skill", "note", 0.0, 0.0, cause, "Check the answers of the rows.")
    with np.errstate(invalid="ignore", over="ignore"):
        gain = baseline - loss
        value = float(gain.mean()) / level
        is_better = gain.mean() > NOISE * gain.std() / np.sqrt(len(gain))
    if is_better:
        return Finding("skill", "ok", value, 0.0, f"the predictions are better than {name} of these rows.", "")
    cause = f"the predictions of these rows are not clearly better than {name}, {ignores}."
    advice = "Check the prompts, the answers and the learning rates, and train longer."
    return Finding("skill", "warning", value, 0.0, cause, advice)


def _one_class(prediction: Prediction) -> Finding:
    counts = np.bincount(prediction.labels)
    value = float(counts.max() / counts.sum())
    _, answers = np.unique(np.asarray(prediction.target), return_counts=True)
    if value < 1 or len(answers) == 1:
        return Finding("one_class", "ok", value, 1.0, "the most frequent prediction is not that of all rows.", "")
    is_serious = 1 - answers.max() / answers.sum() >= OTHER_ANSWERS
    cause = f"the most probable class is {prediction.classes[int(counts.argmax())]!r} for all rows."
    advice = "Check the prompts and the answers, lower the learning rates, or train longer."
    return Finding("one_class", "warning" if is_serious else "note", value, 1.0, cause, advice)
