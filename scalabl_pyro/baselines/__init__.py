"""Other ways to fine-tune, one file each, with the verbs of :func:`scalabl_pyro.fit`.

Those that train take the *base* model, adapt it, and return a result with ``.posterior`` and ``.history``; the others
start from a fitted posterior. ``posterior.blora().unload()`` gives the base model back for the next method.
"""

from . import saving
from .bayes_by_backprop import NormalNoise, blob
from .dropout import DropoutNoise, mc_dropout
from .ensembles import EnsemblePosterior, deep_ensemble
from .factor_posterior import NOISES, FactorNoise, FactorPosterior
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
    "FactorNoise",
    "FactorPosterior",
    "KLReweighting",
    "KroneckerNoise",
    "NormalNoise",
    "Predictor",
    "SpectralNoise",
    "TemperatureScaled",
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
