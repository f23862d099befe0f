"""Posterior families, one per file, for ``guide=`` of :func:`scalabl_pyro.fit`."""

from .auto import AutoFamily, AutoInstance
from .base import Guide
from .covariance import CovarianceGuide, LowRankGuide
from .delta import DeltaGuide
from .empirical import EmpiricalGuide
from .flow import FlowGuide
from .initial_scale import INIT_SCALE as INIT_SCALE
from .mean_field import MeanFieldGuide, WithHyperparameters
from .mixture import MixtureGuide
from .normal import NormalGuide
from .particles import ParticleGuide
from .rank_mask import RankMaskGuide
from .resolve import FAMILIES as FAMILIES
from .resolve import NAMES as NAMES
from .resolve import GuideLike as GuideLike
from .resolve import GuideName as GuideName
from .resolve import as_guide
from .resolve import from_options as from_options
from .resolve import to_config as to_config
from .resolve import wrap_autoguide as wrap_autoguide

__all__ = [
    "AutoFamily",
    "AutoInstance",
    "CovarianceGuide",
    "DeltaGuide",
    "EmpiricalGuide",
    "FlowGuide",
    "Guide",
    "LowRankGuide",
    "MeanFieldGuide",
    "MixtureGuide",
    "NormalGuide",
    "ParticleGuide",
    "RankMaskGuide",
    "WithHyperparameters",
    "as_guide",
]
