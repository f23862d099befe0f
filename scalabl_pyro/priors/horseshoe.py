"""Regularized horseshoe prior: few large latents, many near zero."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .._errors import check_scale
from ..lora.subspace import Subspace
from .base import Prior
from .half_cauchy import HalfCauchy


class HorseshoePrior(Prior):
    """The regularized horseshoe of Piironen and Vehtari (2017, eq. 2.8).

        global_scale ~ HalfCauchy(tau)       local_scale_i ~ HalfCauchy(1)
        slab_variance ~ InverseGamma(df / 2, df slab^2 / 2)
        s_i ~ Normal(0, global_scale * lambda_i),  lambda_i^2 = c^2 l_i^2 / (c^2 + g^2 l_i^2)

    where g, l_i and c^2 are the three latents above. Large latents are shrunk as under a Student-t with ``df`` degrees
    of freedom and scale ``slab``.

    Args:
        global_scale: Scale tau of the latents that are shrunk to zero; a small one gives few large latents.
        slab: Scale of the large latents.
        df: Degrees of freedom of the large latents.

    Raises:
        ValueError: An argument is not positive and finite.

    Example:
        >>> scalabl_pyro.priors.as_prior(scalabl_pyro.priors.HorseshoePrior(global_scale=0.01), blora.subspace)
        HorseshoePrior()
    """

    family = "horseshoe"

    def __init__(self, global_scale: float = 0.1, slab: float = 1.0, df: float = 4.0) -> None:
        super().__init__()
        check_scale(global_scale=global_scale, slab=slab, df=df)
        for name, value in {"global_scale": global_scale, "slab": slab, "df": df}.items():
            self.register_buffer(name, torch.tensor(float(value)))

    def setup(self, subspace: Subspace) -> None:
        """Prepare one local scale per latent."""
        self.dim = subspace.dim

    def forward(self) -> Tensor:
        """Sample the scales and s, (..., D)."""
        half = self.df / 2
        slab_variance = pyro.sample("slab_variance", dist.InverseGamma(half, half * self.slab**2)).unsqueeze(-1)
        global_scale = pyro.sample("global_scale", HalfCauchy(self.global_scale)).unsqueeze(-1)
        local = pyro.sample("local_scale", HalfCauchy(torch.ones_like(self.slab).expand(self.dim)).to_event(1))
        variance = (global_scale * local).square()
        scale = (slab_variance * variance / (slab_variance + variance)).sqrt()
        return pyro.sample("s", dist.Normal(torch.zeros_like(scale), scale).to_event(1))

    def options(self) -> dict[str, Any]:
        """Return the three hyperparameters."""
        return {name: getattr(self, name).item() for name in ("global_scale", "slab", "df")}
