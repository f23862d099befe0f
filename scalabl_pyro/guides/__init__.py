"""Posterior families, one per file, for ``guide=`` of :func:`scalabl_pyro.fit`."""

from .auto import AutoFamily, AutoInstance
from .base import Guide
from .covariance import CovarianceGuide, LowRankGuide
from .delta import DeltaGuide
from .empirical import EmpiricalGuide
from .flow import FlowGuide
from .initial_scale import INIT_SCALE
from .mean_field import MeanFieldGuide, WithHyperparameters
from .mixture import MixtureGuide
from .normal import NormalGuide
from .particles import ParticleGuide
from .rank_mask import RankMaskGuide
from .resolve import FAMILIES, NAMES, GuideLike, GuideName, as_guide, from_options, to_config, wrap_autoguide

__all__ = [
    "FAMILIES",
    "INIT_SCALE",
    "NAMES",
    "AutoFamily",
    "AutoInstance",
    "CovarianceGuide",
    "DeltaGuide",
    "EmpiricalGuide",
    "FlowGuide",
    "Guide",
    "GuideLike",
    "GuideName",
    "LowRankGuide",
    "MeanFieldGuide",
    "MixtureGuide",
    "NormalGuide",
    "ParticleGuide",
    "RankMaskGuide",
    "WithHyperparameters",
    "as_guide",
    "from_options",
    "to_config",
    "wrap_autoguide",
]
