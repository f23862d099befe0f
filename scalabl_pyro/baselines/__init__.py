"""Other ways to fine-tune, one file each, with the verbs of :func:`scalabl_pyro.fit`.

Those that train take the *base* model, adapt it, and return a result with ``.posterior`` and ``.history``; the others
start from a fitted posterior. ``posterior.blora().unload()`` gives the base model back for the next method.
"""

from . import saving
from .deep_ensemble import EnsemblePosterior, deep_ensemble
from .factor_posterior import NOISES, FactorNoise, FactorPosterior
from .kl_reweighting import KLReweighting
from .map_lora import map_lora
from .mc_dropout import DropoutNoise, mc_dropout
from .mle import mle
from .predictor import BaselineResult, Predictor
from .saving import load
from .scalabl_released import scalabl_released
from .temperature_scaling import TemperatureScaled, temperature_scaling

__all__ = [
    "BaselineResult",
    "DropoutNoise",
    "EnsemblePosterior",
    "FactorNoise",
    "FactorPosterior",
    "KLReweighting",
    "Predictor",
    "TemperatureScaled",
    "deep_ensemble",
    "load",
    "map_lora",
    "mc_dropout",
    "mle",
    "scalabl_released",
    "temperature_scaling",
]

NOISES |= {noise.family: noise for noise in (DropoutNoise,)}
saving.KINDS |= {kind.kind: kind.from_saved for kind in (EnsemblePosterior, FactorPosterior, TemperatureScaled)}
