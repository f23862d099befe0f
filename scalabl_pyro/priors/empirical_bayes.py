"""A scale that maximizes the ELBO: empirical Bayes."""

from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from .._errors import check_choice
from ..lora.subspace import Subspace
from .base import Prior, layer_of_latent
from .hierarchical import positive


class EmpiricalBayesPrior(Prior):
    """s_i ~ Normal(0, scale), scale learned as a point estimate with everything else (type-II maximum likelihood).

    At the optimum scale^2 is the mean of loc^2 + sd^2 over the latents that share it (MacKay, 1992). The ELBO then
    bounds the evidence of the learned prior, not of one fixed before seeing the data.

    Args:
        per: ``"layer"`` or ``"global"``.
        scale: where it starts.
    """

    family = "empirical"

    def __init__(self, per: str = "layer", scale: float = 1.0) -> None:
        super().__init__()
        check_choice("per", per, ("layer", "global"))
        self.per = per
        self.start = positive("scale", scale)

    def setup(self, subspace: Subspace) -> None:
        """One scale a layer, or one for all."""
        groups = len(subspace) if self.per == "layer" else 1
        index = layer_of_latent(subspace) if self.per == "layer" else torch.zeros(subspace.dim, dtype=torch.long)
        self.scale: Tensor | PyroParam = PyroParam(torch.full((groups,), self.start), constraints.positive)
        self.register_buffer("group", index, persistent=False)

    def forward(self) -> Tensor:
        """Sample s, (..., D)."""
        scale = cast(Tensor, self.scale)[self.group]
        return pyro.sample("s", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    def options(self) -> dict[str, Any]:
        """What shares a scale."""
        return {"per": self.per}
