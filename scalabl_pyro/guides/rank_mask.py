"""Posterior of rank masks: Bernoulli, with gradients straight through the draw."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..model.bayesian_lora import BayesianLoRA
from .base import Guide


class StraightThroughBernoulli(dist.Bernoulli):
    """A Bernoulli whose draws are exactly 0 or 1, and differentiable (ReinMax: Liu et al., NeurIPS 2023).

    d/dlogit E[f(m)] = p (1 - p) (f(1) - f(0)), and the trapezoid rule makes f(1) - f(0) of f'(0) and f'(1). One draw
    sees one of the two slopes, so it is given the slope dm/dlogit = (1 - p) / 2 where m = 1 and p / 2 where m = 0: on
    average the exact gradient where f is quadratic in each mask, such as a Gaussian log likelihood, and right to
    second order elsewhere. (A binary Concrete, that is a tempered sigmoid in place of the trapezoid, is noisier, and
    its bias leaves directions that only harm half switched on.) The KL from a Bernoulli is torch's closed form.
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's own signature
        """Zeros and ones, with the slope of the trapezoid rule."""
        logits = self.logits.expand(self._extended_shape(sample_shape))
        fixed = logits.detach()
        mask = (torch.rand_like(fixed) >= torch.sigmoid(-fixed)).to(fixed.dtype)
        slope = torch.where(mask > 0, torch.sigmoid(-fixed), torch.sigmoid(fixed)) / 2
        return mask + slope * (logits - fixed)


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
