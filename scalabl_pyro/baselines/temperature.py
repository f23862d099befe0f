"""Temperature scaling: one number, fitted on validation rows, that makes probabilities flatter (Guo et al., 2017).

The logits of *each draw* are divided by the temperature. The fit minimizes the NLL of the mixture of the draws. So a
scaled prediction keeps its draws and the split of its uncertainty. For a point posterior this is ordinary temperature
scaling. (Scaling the logits of the averaged probabilities would lose the draws.)
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast, overload

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

from .._arguments import check_role, known_arguments_of_methods
from .._errors import ScalaBLWarning, check_scale, stacklevel_outside
from ..prediction.averaged import AveragedNumericPrediction, AveragedPrediction
from ..prediction.mixture import log_mean_exp
from ..prediction.result import NumericPrediction, Prediction
from . import saving
from .predictor import DerivedPredictor, Predictor

#: Smallest and largest temperature of the search.
LIMITS = (0.01, 100.0)


@overload
def temperature_scaling(
    predictor: Prediction, validation: Prediction, *, num_draws: int = ..., seed: int = ..., **options: Any
) -> Prediction: ...


@overload
def temperature_scaling(
    predictor: Predictor, validation: Any, *, num_draws: int = ..., seed: int = ..., **options: Any
) -> "TemperatureScaled": ...


def temperature_scaling(
    predictor: Predictor | Prediction, validation: Any, *, num_draws: int = 10, seed: int = 0, **options: Any
) -> "TemperatureScaled | Prediction":
    """Fit a temperature on validation rows and apply it to a predictor or a prediction.

    The other methods do not use validation rows, so compare with care.

    Args:
        predictor: Posterior or baseline to scale; or an existing prediction to scale.
        validation: Labeled rows; or an existing prediction of such rows by the same method.
        num_draws: Number of draws for the fit if ``validation`` are rows.
        seed: Seed of those draws.
        options: Options of ``predict``: ``batch_size``, ``progress``.

    Returns:
        A :class:`TemperatureScaled` predictor; or a scaled prediction if ``predictor`` is a prediction.

    Raises:
        TypeError: The prediction has no classes, or ``predictor`` is a prediction but ``validation`` are rows.
        ValueError: The validation rows have no answers.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 9.

    Example:
        >>> scaled = scalabl_pyro.baselines.temperature_scaling(posterior, validation_rows)
        >>> scaled.temperature, scaled.predict(test_data).metrics()
    """
    for name, given in (("predictor", predictor), ("validation", validation)):
        if isinstance(given, AveragedPrediction | AveragedNumericPrediction):
            check_role(name, given, "prediction")
    if not isinstance(predictor, Predictor | Prediction | NumericPrediction):
        check_role("predictor", predictor, "posterior", call="temperature_scaling(posterior, validation)")
    if isinstance(validation, Prediction | NumericPrediction):
        seen = validation
    elif isinstance(predictor, Prediction | NumericPrediction):
        raise TypeError(
            "A prediction cannot predict the validation rows: pass the prediction of those rows as validation, "
            "posterior.predict(validation_rows)."
        )
    else:
        seen = predictor.predict(validation, num_draws=num_draws, seed=seed, **options)
    temperature = fit_temperature(seen)
    assert isinstance(seen, Prediction)
    if isinstance(predictor, Prediction | NumericPrediction):
        return apply_temperature(predictor, temperature)
    return TemperatureScaled(predictor, temperature, {"num_validation": int(seen.is_answered.sum())})


def fit_temperature(prediction: Prediction | NumericPrediction) -> float:
    """Find the temperature with the smallest NLL of the mixture of draws, in float64.

    Args:
        prediction: Prediction of labeled rows.
    """
    _log_probs(prediction)  # refuses numbers
    if prediction.target is None:
        raise ValueError("The validation rows have no answers: pass labeled rows to fit a temperature.")
    answered = prediction.with_answers()
    log_probs, target = _log_probs(answered), cast(NDArray[np.integer], answered.target)

    def loss(log_temperature: float) -> float:
        return mixture_nll(log_probs, target, math.exp(log_temperature))

    # The NLL of a mixture may have several minima: a grid finds the lowest one, a bounded search refines it.
    grid = np.linspace(math.log(LIMITS[0]), math.log(LIMITS[1]), 93)
    best = int(np.argmin([loss(t) for t in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    temperature = float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x))
    if best in (0, len(grid) - 1):
        warnings.warn(
            f"The NLL of the validation rows is still falling at temperature {temperature:.3g}: they are all answered "
            "right, or they hold no information about the temperature. Use more validation rows.",
            ScalaBLWarning,
            stacklevel=stacklevel_outside(),
        )
    return temperature


def apply_temperature(prediction: Prediction | NumericPrediction, temperature: float) -> Prediction:
    """Divide the logits of each draw by the temperature."""
    check_scale(temperature=temperature)
    log_probs = _log_probs(prediction)
    assert isinstance(prediction, Prediction)
    scaled = log_softmax(log_probs / temperature, axis=-1)
    return replace(prediction, log_probs=scaled.astype(prediction.log_probs.dtype))


def mixture_nll(log_probs: NDArray[np.floating], target: NDArray[np.integer], temperature: float) -> float:
    """Return the mean of -log 1/S sum_s softmax(log_probs[s] / temperature)[target], in nats per row."""
    scaled = log_softmax(log_probs / temperature, axis=-1)
    chosen = np.take_along_axis(scaled, target[None, :, None], axis=2)[..., 0]
    return float(-log_mean_exp(chosen).mean())


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class TemperatureScaled(DerivedPredictor):
    """A predictor whose logits are divided by a temperature.

    Attributes:
        base: Predictor whose logits are scaled.
        temperature: Divisor of the logits. Above 1 it makes probabilities flatter.
        provenance: Settings of the fit.

    Example:
        >>> scaled = scalabl_pyro.baselines.TemperatureScaled(posterior, temperature=1.5)
        >>> scaled.predict(test_data, num_draws=10).probs
    """

    kind: ClassVar[str] = "temperature"

    base: Predictor
    temperature: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_scale(temperature=self.temperature)

    @property
    def source(self) -> Predictor:
        """Base, which gives adapter and task."""
        return self.base

    def _own_facts(self) -> dict[str, object]:
        return {"temperature": f"{self.temperature:.4g}", "base": type(self.base).__name__}

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction:
        """Predict rows with the base, and divide the logits of each draw by the temperature."""
        options: dict[str, Any] = {"num_draws": num_draws, "batch_size": batch_size, "progress": progress}
        return apply_temperature(self.base.predict(data, seed=seed, **options), self.temperature)

    def save_pretrained(self, path: str | Path) -> None:
        """Save the base predictor and the temperature. :func:`scalabl_pyro.baselines.load` reads both."""
        options = {"temperature": self.temperature, "provenance": dict(self.provenance)}
        saving.save(path, self.kind, options, children={"base": self.base})

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Predictor]
    ) -> "TemperatureScaled":
        """Build the predictor from what :func:`scalabl_pyro.baselines.load` has read."""
        temperature = options["temperature"]
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r} must be a positive finite number.")
        return cls(children["base"], float(temperature), options["provenance"])


def _log_probs(prediction: Prediction | NumericPrediction) -> NDArray[np.float64]:
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"Temperature scaling needs a Prediction of classes, but this is a {type(prediction).__name__}. "
            "Do not scale predictions of numbers: training has already learned the scale of their noise."
        )
    return prediction.log_probs.astype(np.float64)
