"""Normalizing-flow posterior: a mean-field normal bent by inverse autoregressive transforms."""

from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn import AutoRegressiveNN, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform

from .._process.random_state import scoped_seed
from ..model.bayesian_lora import BayesianLoRA
from .base import Guide

#: Draws behind the mean, which has no closed form.
MEAN_DRAWS = 1000


class FlowGuide(Guide):
    """s = loc + scale * f(e), e ~ Normal(0, I), f a stack of inverse autoregressive transforms (Kingma et al., 2016).

    f starts at the identity, so training starts at the mean-field normal. Drawing is one pass of each small network;
    the density of a draw comes with it.

    Args:
        loc: (D,) initial means.
        scale: (D,) initial standard deviations.
        num_transforms: how often the latents are bent, in alternating order.
        hidden: width of each network; default D + 1, the smallest that lets each latent depend on all before it.
        seed: of the networks' weights.
    """

    family = "flow"

    def __init__(
        self, loc: Tensor, scale: Tensor, *, num_transforms: int = 2, hidden: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        dim = len(loc)
        hidden = dim + 1 if hidden is None else hidden
        if dim < 2 or num_transforms < 1 or not dim < hidden <= 10 * dim + 10:
            raise ValueError(
                f"A flow over {dim} latents needs 2 latents, num_transforms >= 1 (got {num_transforms}) and a hidden "
                f"width from {dim + 1} to {10 * dim + 10} (got {hidden})."
            )
        self.num_transforms, self.hidden = num_transforms, hidden
        self.loc = nn.Parameter(loc.detach().clone())
        self.scale: Tensor | PyroParam = PyroParam(scale.detach().clone(), constraint=constraints.positive)
        with scoped_seed(seed):
            orders = [torch.arange(dim) if i % 2 == 0 else torch.arange(dim).flip(0) for i in range(num_transforms)]
            self.networks = nn.ModuleList(
                AutoRegressiveNN(dim, [hidden], permutation=cast(Any, order)) for order in orders
            )
        self.networks.to(loc)
        for network in self.networks:
            last = cast(Any, network).layers[-1]
            nn.init.zeros_(last.weight)  # shift 0 and log scale 0: the identity
            nn.init.zeros_(last.bias)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D)."""
        base = dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)
        # Read as an attribute, which is what tells Pyro's store about their weights under stock SVI.
        bends = [AffineAutoregressive(cast(Any, network), stable=False) for network in self.networks]
        # Cached, so that the density of a draw does not invert the flow, one latent after the other.
        place = AffineTransform(self.loc, cast(Tensor, self.scale), event_dim=1, cache_size=1)
        return pyro.sample("s", dist.TransformedDistribution(base, [*bends, place]))

    def mean(self) -> dict[str, Tensor]:
        """The average of MEAN_DRAWS draws."""
        with torch.no_grad(), scoped_seed(0), pyro.plate("draws", MEAN_DRAWS):
            return {"s": self().mean(0)}

    def options(self) -> dict[str, Any]:
        """Depth and width."""
        return {"num_transforms": self.num_transforms, "hidden": self.hidden}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "FlowGuide":
        """The family again, its tensors to be filled."""
        loc = blora.adapter.loc
        return cls(loc, torch.ones_like(loc), **options)
