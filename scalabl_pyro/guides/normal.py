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
    """q(s) = Normal(loc, diag(scale^2)), sampled at the site itself so that its KL has a closed form.

    (Pyro's AutoNormal samples an auxiliary site and a Delta, which leaves ``TraceMeanField_ELBO`` no closed form.)

    Args:
        loc: (D,) initial means.
        scale: (D,) initial standard deviations.

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

    def covariance(self) -> Tensor:
        """(D, D), diagonal."""
        return torch.diag(cast(Tensor, self.scale).square())

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "NormalGuide":
        """The family again, its tensors to be filled."""
        loc = blora.adapter.loc
        return cls(loc, torch.ones_like(loc))

    def mean(self) -> dict[str, Tensor]:
        """Loc."""
        return {"s": self.loc}
