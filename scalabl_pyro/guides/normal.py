"""Mean-field normal posterior of s, the family of the paper."""

from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from ..model.bayesian_lora import BayesianLoRA
from .base import Guide


class NormalGuide(Guide):
    """q(s) = Normal(loc, diag(scale^2)).

    The guide samples the site ``s`` directly from this normal. So the KL from a normal prior has a closed form. (Pyro's
    AutoNormal draws a helper site and sets ``s`` to its value. ``TraceMeanField_ELBO`` has no closed form for that.)

    Args:
        loc: Initial means (D,).
        scale: Initial standard deviations (D,).

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.NormalGuide(torch.zeros(3), torch.ones(3))
        >>> guide.sample(5, seed=0)["s"].shape
        torch.Size([5, 3])

    References:
        Samplawski et al., UAI 2025, section 3 (posterior and initialization).
    """

    family = "normal"

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone())
        self.scale: Tensor | PyroParam = PyroParam(scale.detach().clone(), constraint=constraints.positive)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D)."""
        return pyro.sample("s", dist.Normal(self.loc, cast(Tensor, self.scale)).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """Return ``loc``."""
        return {"s": self.loc}

    def covariance(self) -> Tensor:
        """Return the diagonal covariance (D, D)."""
        return torch.diag(cast(Tensor, self.scale).square())

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "NormalGuide":
        """Rebuild the family; the caller fills its tensors."""
        loc = blora.adapter.loc
        return cls(loc, torch.ones_like(loc))
