"""A scale for each layer that is inferred with s."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..lora.subspace import Subspace
from .base import Prior, layer_of_latent


class HierarchicalPrior(Prior):
    """layer_scale_l ~ HalfCauchy(scale), s_i ~ Normal(0, layer_scale_l(i)).

    Layers that the data do not need can shrink as a whole (Gelman, 2006, on half-Cauchy scales).

    Args:
        scale: median of the layers' scales.
    """

    family = "hierarchical"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(positive("scale", scale)))

    def setup(self, subspace: Subspace) -> None:
        """One scale a layer."""
        self.num_layers = len(subspace)
        self.register_buffer("layer", layer_of_latent(subspace), persistent=False)

    def forward(self) -> Tensor:
        """Sample ``layer_scale``, (..., layers), and s, (..., D)."""
        scales = pyro.sample("layer_scale", dist.HalfCauchy(self.scale.expand(self.num_layers)).to_event(1))
        return pyro.sample("s", dist.Normal(torch.zeros_like(scales[..., :1]), scales[..., self.layer]).to_event(1))

    def options(self) -> dict[str, Any]:
        """The median."""
        return {"scale": self.scale.item()}


def positive(name: str, value: Any) -> float:
    """``value`` as a positive finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a positive finite number.")
    return float(value)
