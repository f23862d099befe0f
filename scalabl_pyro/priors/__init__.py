"""Priors over the latents s, one family per file, for ``prior=`` of :func:`scalabl_pyro.bayesian_lora`."""

from .base import Prior
from .empirical_bayes import EmpiricalBayesPrior
from .fixed import FixedPrior
from .hierarchical import HierarchicalPrior
from .horseshoe import HorseshoePrior
from .rank_mask import RankMaskPrior
from .resolve import DISTRIBUTIONS as DISTRIBUTIONS
from .resolve import FAMILIES as FAMILIES
from .resolve import PriorLike as PriorLike
from .resolve import PriorName as PriorName
from .resolve import as_prior
from .resolve import from_saved as from_saved
from .resolve import to_config as to_config

__all__ = [
    "EmpiricalBayesPrior",
    "FixedPrior",
    "HierarchicalPrior",
    "HorseshoePrior",
    "Prior",
    "RankMaskPrior",
    "as_prior",
]
