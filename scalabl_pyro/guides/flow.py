"""Normalizing-flow posterior: a mean-field normal passed through inverse autoregressive transforms."""

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

#: Number of draws behind the mean, which has no closed form.
MEAN_DRAWS = 1000


class FlowGuide(Guide):
    """s = loc + scale * f(e), e ~ Normal(0, I), f a stack of inverse autoregressive transforms.

    f starts at the identity, so training starts at the mean-field normal. A draw takes one pass of each small network
    and gives its density too.

    Args:
        loc: Initial means (D,).
        scale: Initial standard deviations (D,).
        num_transforms: Number of transforms. The order of the latents alternates between them.
        hidden: Width of each network, from D + 1 to 10 D + 10. The default D + 1 is the smallest width that lets each
            latent depend on all latents before it.
        seed: Seed of the networks' weights.

    Raises:
        ValueError: Fewer than 2 latents, fewer than 1 transform, or a width outside its range.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.FlowGuide(torch.zeros(3), torch.ones(3))
        >>> guide.sample(5, seed=0)["s"].shape
        torch.Size([5, 3])

    References:
        Kingma et al., Improved variational inference with inverse autoregressive flow, NeurIPS 2016.
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
                f"Got a flow over {dim} latents with num_transforms={num_transforms} and hidden={hidden}. It needs 2 "
                f"or more latents, num_transforms >= 1, and hidden from {dim + 1} to {10 * dim + 10}."
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
        # Reading self.networks as an attribute registers its weights in Pyro's store, which stock SVI needs.
        transforms = [AffineAutoregressive(cast(Any, network), stable=False) for network in self.networks]
        # Cached, so that the density of a draw does not invert the flow latent by latent.
        affine = AffineTransform(self.loc, cast(Tensor, self.scale), event_dim=1, cache_size=1)
        return pyro.sample("s", dist.TransformedDistribution(base, [*transforms, affine]))

    def mean(self) -> dict[str, Tensor]:
        """Return the average of ``MEAN_DRAWS`` draws."""
        with torch.no_grad(), scoped_seed(0), pyro.plate("draws", MEAN_DRAWS):
            return {"s": self().mean(0)}

    def options(self) -> dict[str, Any]:
        """Return number of transforms and width."""
        return {"num_transforms": self.num_transforms, "hidden": self.hidden}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "FlowGuide":
        """Rebuild the family; the caller fills its tensors."""
        loc = blora.adapter.loc
        return cls(loc, torch.ones_like(loc), **options)
