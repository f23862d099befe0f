"""Few large latents, many near zero: the regularized horseshoe."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..lora.subspace import Subspace
from .base import Prior
from .hierarchical import positive


class HorseshoePrior(Prior):
    """The regularized horseshoe of Piironen and Vehtari (2017, eq. 2.8).

        global_scale ~ HalfCauchy(tau)       local_scale_i ~ HalfCauchy(1)
        slab_variance ~ InverseGamma(df / 2, df slab^2 / 2)
        s_i ~ Normal(0, global_scale * lambda_i),  lambda_i^2 = c^2 l_i^2 / (c^2 + g^2 l_i^2)

    with g, l_i, c^2 the three latents above. Large latents are shrunk like under a Student-t with ``df`` degrees of
    freedom and scale ``slab``.

    Args:
        global_scale: tau, the scale of what is shrunk; small means sparse.
        slab: scale of what is not.
        df: degrees of freedom of the slab.
    """

    family = "horseshoe"

    def __init__(self, global_scale: float = 0.1, slab: float = 1.0, df: float = 4.0) -> None:
        super().__init__()
        for name, value in {"global_scale": global_scale, "slab": slab, "df": df}.items():
            self.register_buffer(name, torch.tensor(positive(name, value)))

    def setup(self, subspace: Subspace) -> None:
        """One local scale a latent."""
        self.dim = subspace.dim

    def forward(self) -> Tensor:
        """Sample the scales and s, (..., D)."""
        half = self.df / 2
        slab_variance = pyro.sample("slab_variance", dist.InverseGamma(half, half * self.slab**2)).unsqueeze(-1)
        overall = pyro.sample("global_scale", dist.HalfCauchy(self.global_scale)).unsqueeze(-1)
        local = pyro.sample("local_scale", dist.HalfCauchy(torch.ones_like(self.slab).expand(self.dim)).to_event(1))
        wide = (overall * local).square()
        scale = (slab_variance * wide / (slab_variance + wide)).sqrt()
        return pyro.sample("s", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    def options(self) -> dict[str, Any]:
        """The three hyperparameters."""
        return {name: getattr(self, name).item() for name in ("global_scale", "slab", "df")}
