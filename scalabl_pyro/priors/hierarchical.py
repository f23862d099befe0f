"""Hierarchical prior: one scale per layer, inferred together with s."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .._errors import check_scale
from ..lora.subspace import Subspace
from .base import Prior, layer_of_latent
from .half_cauchy import HalfCauchy


class HierarchicalPrior(Prior):
    """layer_scale_l ~ HalfCauchy(scale), s_i ~ Normal(0, layer_scale_l(i)).

    A layer that the data do not need can shrink as a whole.

    Args:
        scale: Median of the layers' scales.

    Raises:
        ValueError: ``scale`` is not positive and finite.

    Example:
        >>> prior = scalabl_pyro.priors.as_prior(scalabl_pyro.priors.HierarchicalPrior(0.5), blora.subspace)
        >>> prior.num_layers == len(blora.subspace)
        True

    References:
        Gelman, Prior distributions for variance parameters in hierarchical models, Bayesian Analysis 2006.
    """

    family = "hierarchical"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        check_scale(scale=scale)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def setup(self, subspace: Subspace) -> None:
        """Prepare one scale per layer."""
        self.num_layers = len(subspace)
        self.register_buffer("layer", layer_of_latent(subspace), persistent=False)

    def forward(self) -> Tensor:
        """Sample ``layer_scale``, (..., layers), and s, (..., D)."""
        scales = pyro.sample("layer_scale", HalfCauchy(self.scale.expand(self.num_layers)).to_event(1))
        return pyro.sample("s", dist.Normal(torch.zeros_like(scales[..., :1]), scales[..., self.layer]).to_event(1))

    def options(self) -> dict[str, Any]:
        """Return the median."""
        return {"scale": self.scale.item()}
