"""Methods to compare with: point estimates, dropout, ensembles, BLoB, TFB, Laplace-LoRA, temperature scaling.

Some methods train. They take the *base* model, adapt it, and return a result with ``.posterior`` and ``.history``. The
others start from a fitted posterior. ``posterior.blora().unload()`` gives the base model back for the next method.
"""

import warnings
from typing import Any

from .._deprecated import ScalaBLDeprecationWarning
from . import saving
from .bayes_by_backprop import NormalNoise, blob
from .dropout import DropoutNoise, mc_dropout
from .ensembles import EnsemblePosterior, deep_ensemble
from .factor_posterior import NOISES, FactorPosterior, WeightNoise
from .kronecker_laplace import KroneckerNoise, laplace_lora
from .point_lora import map_lora, mle
from .predictor import BaselineResult, Predictor
from .released_kl import KLReweighting
from .released_training import scalabl_released
from .saving import load
from .temperature import TemperatureScaled, temperature_scaling
from .training_free import SpectralNoise, tfb

__all__ = [
    "BaselineResult",
    "DropoutNoise",
    "EnsemblePosterior",
    "FactorPosterior",
    "KLReweighting",
    "KroneckerNoise",
    "NormalNoise",
    "Predictor",
    "SpectralNoise",
    "TemperatureScaled",
    "WeightNoise",
    "blob",
    "deep_ensemble",
    "laplace_lora",
    "load",
    "map_lora",
    "mc_dropout",
    "mle",
    "scalabl_released",
    "temperature_scaling",
    "tfb",
]

NOISES |= {noise.family: noise for noise in (DropoutNoise, KroneckerNoise, NormalNoise, SpectralNoise)}
saving.KINDS |= {kind.kind: kind.from_saved for kind in (EnsemblePosterior, FactorPosterior, TemperatureScaled)}

#: Old name -> new name; old names work for one release.
_RENAMED = {"FactorNoise": "WeightNoise"}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"{__name__}.{name} is now called {new}.", ScalaBLDeprecationWarning, stacklevel=2)
    return globals()[new]
