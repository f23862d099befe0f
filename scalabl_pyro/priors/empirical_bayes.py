"""Empirical Bayes: scales of the prior that are learned as point estimates by the same ELBO."""

from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from .._errors import check_choice, check_scale
from ..lora.subspace import Subspace
from .base import Prior, layer_of_latent


class EmpiricalBayesPrior(Prior):
    """s_i ~ Normal(0, scale), with a learned point estimate of scale (type-II maximum likelihood).

    At the optimum, scale^2 is the mean of loc^2 + sd^2 over the latents that share it (MacKay, 1992). The ELBO then
    bounds the evidence of the learned prior, not the evidence of a prior fixed before seeing the data.

    Args:
        per: Latents that share a scale: those of a ``"layer"``, or all (``"global"``).
        scale: Initial scale.

    Raises:
        ValueError: ``per`` is unknown, or ``scale`` is not positive and finite.

    Example:
        >>> scalabl_pyro.priors.EmpiricalBayesPrior(per="global", scale=0.5).options()
        {'per': 'global'}
    """

    family = "empirical"

    def __init__(self, per: Literal["layer", "global"] = "layer", scale: float = 1.0) -> None:
        super().__init__()
        check_choice("per", per, ("layer", "global"))
        check_scale(scale=scale)
        self.per = per
        self.initial_scale = float(scale)

    def setup(self, subspace: Subspace) -> None:
        """Create one scale per layer, or one for all."""
        groups = len(subspace) if self.per == "layer" else 1
        index = layer_of_latent(subspace) if self.per == "layer" else torch.zeros(subspace.dim, dtype=torch.long)
        self.scale: Tensor | PyroParam = PyroParam(torch.full((groups,), self.initial_scale), constraints.positive)
        self.register_buffer("group", index, persistent=False)

    def forward(self) -> Tensor:
        """Sample s, (..., D)."""
        scale = cast(Tensor, self.scale)[self.group]
        return pyro.sample("s", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    def options(self) -> dict[str, Any]:
        """Return which latents share a scale."""
        return {"per": self.per}
