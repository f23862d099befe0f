"""Bernoulli masks: which rank directions a layer keeps."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..lora.subspace import Subspace
from .base import Prior


class RankMaskPrior(Prior):
    """Each entry s_i ~ Bernoulli(probability): 1 keeps a rank direction (a row of A), 0 removes it.

    The entries have no size of their own; B learns the size of each direction.

    Its guide is :class:`~scalabl_pyro.guides.RankMaskGuide`, whose KL is in closed form. The model is that of DALorRA
    (arXiv 2607.02182).

    Args:
        probability: Prior probability that a direction is kept, between 0 and 1.

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1.

    Example:
        >>> scalabl_pyro.priors.as_prior(scalabl_pyro.priors.RankMaskPrior(0.5), blora.subspace)
        RankMaskPrior()
    """

    family = "rank_mask"

    def __init__(self, probability: float = 0.9) -> None:
        super().__init__()
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 < probability < 1:
            raise ValueError(f"probability={probability!r} must lie between 0 and 1.")
        self.register_buffer("probability", torch.tensor(float(probability)))

    def setup(self, subspace: Subspace) -> None:
        """Prepare one mask per latent."""
        self.dim = subspace.dim

    def forward(self) -> Tensor:
        """Sample s, (..., D), of zeros and ones."""
        return pyro.sample("s", dist.Bernoulli(self.probability.expand(self.dim)).to_event(1))

    def options(self) -> dict[str, Any]:
        """Return the probability."""
        return {"probability": self.probability.item()}
