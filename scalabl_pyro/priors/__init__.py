"""Priors over the latents s, one family per file, for ``prior=`` of :func:`scalabl_pyro.bayesian_lora`."""

from .base import Prior
from .empirical_bayes import EmpiricalBayesPrior
from .fixed import FixedPrior
from .hierarchical import HierarchicalPrior
from .horseshoe import HorseshoePrior
from .rank_mask import RankMaskPrior
from .resolve import DISTRIBUTIONS, FAMILIES, PriorLike, PriorName, as_prior, from_saved, to_config

__all__ = [
    "DISTRIBUTIONS",
    "FAMILIES",
    "EmpiricalBayesPrior",
    "FixedPrior",
    "HierarchicalPrior",
    "HorseshoePrior",
    "Prior",
    "PriorLike",
    "PriorName",
    "RankMaskPrior",
    "as_prior",
    "from_saved",
    "to_config",
]
