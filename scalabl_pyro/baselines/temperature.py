"""One number that makes probabilities flatter or sharper, fitted on validation rows (Guo et al., 2017).

The logits of *each draw* are divided by the temperature, and the mixture of the draws is what is fitted and scored. So
a scaled prediction keeps its draws, and with them the split of its uncertainty; of a point posterior it is ordinary
temperature scaling. (Scaling the logits of the averaged probabilities instead would leave no draws.)
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from .._errors import ScalaBLWarning, check_positive
from ..lora.adapter import Adapter
from ..model.bayesian_lora import BayesianLoRA
from ..prediction.result import NumericPrediction, Prediction
from ..tasks import Task
from . import saving
from .predictor import Predictor

#: Temperatures that are considered.
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
    """Fit a temperature on validation rows, which the other methods do not see, and apply it.

    Args:
        predictor: a posterior or baseline; or a prediction that was made before, to be scaled.
        validation: labeled rows; or a prediction of such rows by the same method, made before.
        num_draws: draws behind the fit where ``validation`` are rows.
        seed: of those draws.
        options: of ``predict`` (``batch_size``, ``progress``).

    Returns:
        What was given, scaled: something that predicts, or a prediction.

    Raises:
        TypeError: a prediction without classes, or a prediction to be scaled with rows to fit on.
        ValueError: validation rows without answers.
    """
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
    return TemperatureScaled(predictor, temperature, {"num_validation": seen.log_probs.shape[1]})


def fit_temperature(prediction: Prediction | NumericPrediction) -> float:
    """The temperature of the smallest NLL of the mixture, in float64.

    Args:
        prediction: of labeled rows.
    """
    log_probs = _log_probs(prediction)
    target: Any = prediction.target
    if target is None:
        raise ValueError("The validation rows have no answers, so no temperature can be fitted on them.")

    def loss(log_temperature: float) -> float:
        return mixture_nll(log_probs, target, math.exp(log_temperature))

    # The mixture's NLL may have several minima: a grid finds the best one, and a bounded search its bottom.
    grid = np.linspace(math.log(LIMITS[0]), math.log(LIMITS[1]), 93)
    best = int(np.argmin([loss(t) for t in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    temperature = float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x))
    if best in (0, len(grid) - 1):
        warnings.warn(
            f"The NLL of the validation rows is still falling at temperature {temperature:.3g}: they are all answered "
            "right (or there is nothing in them to learn from). Use more validation rows.",
            ScalaBLWarning,
            stacklevel=3,
        )
    return temperature


def apply_temperature(prediction: Prediction | NumericPrediction, temperature: float) -> Prediction:
    """Divide the logits of each draw by the temperature."""
    check_positive(temperature=temperature)
    log_probs = _log_probs(prediction)
    assert isinstance(prediction, Prediction)
    scaled = log_softmax(log_probs / temperature, axis=-1)
    return replace(prediction, log_probs=scaled.astype(prediction.log_probs.dtype))


def mixture_nll(log_probs: NDArray[np.floating], target: NDArray[np.integer], temperature: float) -> float:
    """Mean of -log 1/S sum_s softmax(log_probs[s] / temperature)[target], nats a row."""
    scaled = log_softmax(log_probs / temperature, axis=-1)
    chosen = np.take_along_axis(scaled, target[None, :, None], axis=2)[..., 0]
    return float(-(logsumexp(chosen, axis=0) - np.log(len(log_probs))).mean())


@dataclass(frozen=True)
class TemperatureScaled:
    """A predictor whose probabilities are scaled.

    Attributes:
        base: what predicts.
        temperature: above 1 it makes probabilities flatter.
        provenance: how it came about.
    """

    kind: ClassVar[str] = "temperature"

    base: Predictor
    temperature: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature)

    @property
    def adapter(self) -> Adapter:
        """The LoRA layers inside the LLM."""
        return self.base.adapter

    @property
    def task(self) -> Task:
        """The likelihood."""
        return self.base.task

    def blora(self) -> BayesianLoRA:
        """The adapted LLM, to unload."""
        return self.base.blora()

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction:
        """Predict rows with the base, and scale the logits of each draw."""
        options: dict[str, Any] = {"num_draws": num_draws, "batch_size": batch_size, "progress": progress}
        return apply_temperature(self.base.predict(data, seed=seed, **options), self.temperature)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the base, and the temperature beside it; :func:`scalabl_pyro.baselines.load` reads it."""
        options = {"temperature": self.temperature, "provenance": dict(self.provenance)}
        saving.save(path, self.kind, options, children={"base": self.base})

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Predictor]
    ) -> "TemperatureScaled":
        """What :func:`scalabl_pyro.baselines.load` read."""
        temperature = options["temperature"]
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r} must be a positive finite number.")
        return cls(children["base"], float(temperature), options["provenance"])


def _log_probs(prediction: Prediction | NumericPrediction) -> NDArray[np.float64]:
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"A temperature scales the probabilities of classes, but this is a {type(prediction).__name__}: a "
            "likelihood over numbers has a scale of its own to learn."
        )
    return prediction.log_probs.astype(np.float64)
