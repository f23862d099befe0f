"""Which rank directions a layer needs: Bernoulli masks."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..lora.subspace import Subspace
from .base import Prior


class RankMaskPrior(Prior):
    """s_i ~ Bernoulli(probability): each rank direction is in or out, and B carries its size.

    The guide's KL is in closed form and its gradient goes straight through the draws
    (:class:`~scalabl_pyro.guides.RankMaskGuide`). The model is that of DALorRA (arXiv 2607.02182).

    Args:
        probability: of a direction being in.
    """

    family = "rank_mask"

    def __init__(self, probability: float = 0.9) -> None:
        super().__init__()
        if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 < probability < 1:
            raise ValueError(f"probability={probability!r} must lie between 0 and 1.")
        self.register_buffer("probability", torch.tensor(float(probability)))

    def setup(self, subspace: Subspace) -> None:
        """One mask a latent."""
        self.dim = subspace.dim

    def forward(self) -> Tensor:
        """Sample s, (..., D), of zeros and ones."""
        return pyro.sample("s", dist.Bernoulli(self.probability.expand(self.dim)).to_event(1))

    def options(self) -> dict[str, Any]:
        """The probability."""
        return {"probability": self.probability.item()}
