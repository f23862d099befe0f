"""Posterior of rank masks: Bernoulli draws with straight-through gradients."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..model.bayesian_lora import BayesianLoRA
from .base import Guide


class StraightThroughBernoulli(dist.Bernoulli):
    """A Bernoulli whose draws are exactly 0 or 1, and differentiable.

    The exact gradient of a mask m with probability p is d/dlogit E[f(m)] = p (1 - p) (f(1) - f(0)). The trapezoid rule
    approximates f(1) - f(0) by (f'(0) + f'(1)) / 2. A draw sees one of the two slopes. So dm/dlogit is set to
    (1 - p) / 2 where m = 1, and to p / 2 where m = 0. On average this gradient is exact where f is quadratic in each
    mask, such as a Gaussian log likelihood, and correct to second order elsewhere. A binary Concrete, a tempered
    sigmoid instead of the trapezoid rule, is noisier; its bias leaves harmful directions half switched on.

    The KL from another Bernoulli is torch's closed form.

    References:
        Liu et al., Bridging discrete and backpropagation: straight-through and beyond (ReinMax), NeurIPS 2023.
    """

    has_rsample = True

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's own signature
        """Draw zeros and ones, with the slope of the trapezoid rule."""
        logits = self.logits.expand(self._extended_shape(sample_shape))
        fixed = logits.detach()
        mask = (torch.rand_like(fixed) >= torch.sigmoid(-fixed)).to(fixed.dtype)
        slope = torch.where(mask > 0, torch.sigmoid(-fixed), torch.sigmoid(fixed)) / 2
        return mask + slope * (logits - fixed)


class RankMaskGuide(Guide):
    """q(s) = product of Bernoulli(sigmoid(logits)), for :class:`~scalabl_pyro.priors.RankMaskPrior`.

    Args:
        logits: Initial log odds (D,) that a rank direction is kept.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.RankMaskGuide(torch.tensor([-20.0, 20.0]))
        >>> guide.sample(1, seed=0)["s"].tolist()
        [[0.0, 1.0]]
    """

    family = "rank_mask"

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D), of zeros and ones."""
        return pyro.sample("s", StraightThroughBernoulli(logits=self.logits).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """Return the probability (D,) that each direction is kept."""
        return {"s": self.logits.sigmoid()}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "RankMaskGuide":
        """Rebuild the family; the caller fills its tensors."""
        return cls(torch.zeros_like(blora.adapter.loc))
