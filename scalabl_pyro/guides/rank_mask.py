"""Posterior of rank masks: Bernoulli, with gradients through a relaxation."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..model import BayesianLoRA
from .base import Guide


class StraightThroughBernoulli(dist.Bernoulli):
    """A Bernoulli whose draws are exactly 0 or 1, and differentiable as if they were a binary Concrete.

    Its KL from a Bernoulli is torch's closed form; only the expected log likelihood is relaxed (Maddison et al., 2017;
    straight-through as in Jang et al., 2017).
    """

    has_rsample = True
    temperature = 0.5

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's own signature
        """Zeros and ones, with the gradient of the relaxation."""
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((self.logits + uniform.logit()) / self.temperature)
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


class RankMaskGuide(Guide):
    """q(s) = product of Bernoulli(sigmoid(logits)), started at the prior.

    Args:
        logits: (D,) initial log odds of a direction being in.
    """

    family = "rank_mask"

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D), of zeros and ones."""
        return pyro.sample("s", StraightThroughBernoulli(logits=self.logits).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """The probability of each direction being in."""
        return {"s": self.logits.sigmoid()}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "RankMaskGuide":
        """The family again, its tensors to be filled."""
        return cls(torch.zeros_like(blora.adapter.loc))
