"""Posterior of rank masks: Bernoulli draws with straight-through or score-function gradients."""

from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._errors import check_choice
from ..model.bayesian_lora import BayesianLoRA
from .base import Guide

#: How the gradient of the likelihood with respect to the log odds is estimated.
Gradient = Literal["straight_through", "leave_one_out"]


class StraightThroughBernoulli(dist.Bernoulli):
    """A Bernoulli whose draws are exactly 0 or 1, and differentiable.

    The exact gradient of a mask m with probability p is d/dlogit E[f(m)] = p (1 - p) (f(1) - f(0)). The trapezoid rule
    approximates f(1) - f(0) by (f'(0) + f'(1)) / 2. A draw sees one of the two slopes. So dm/dlogit is set to
    (1 - p) / 2 where m = 1, and to p / 2 where m = 0. On average this gradient is exact where f is quadratic in each
    mask, such as a Gaussian log likelihood.

    Elsewhere it is biased. For a tiny network the bias is more than 20 % of the gradient
    (``tests/training/test_score_function.py``). Directions that hardly matter can then get the wrong sign.
    ``RankMaskGuide(..., gradient="leave_one_out")`` has no bias. A binary Concrete, a tempered sigmoid instead of the
    trapezoid rule, is noisier, and its bias leaves harmful directions half switched on.

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
        gradient: ``"straight_through"`` takes the slope of the likelihood at the drawn mask, as
            :class:`~scalabl_pyro.guides.rank_mask.StraightThroughBernoulli` does. Its noise is small, but it is biased
            where the log likelihood is not quadratic in the mask, as that of a language model.
            ``"leave_one_out"`` compares the likelihoods of two masks per row. It is unbiased, noisier, and takes twice
            the rows in the adapted blocks.

    Raises:
        ValueError: ``gradient`` is unknown.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.RankMaskGuide(torch.tensor([-20.0, 20.0]))
        >>> guide.sample(1, seed=0)["s"].tolist()
        [[0.0, 1.0]]
    """

    family = "rank_mask"

    def __init__(self, logits: Tensor, *, gradient: Gradient = "straight_through") -> None:
        super().__init__()
        check_choice("gradient", gradient, get_args(Gradient))
        self.gradient = gradient
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample s, (..., D), of zeros and ones."""
        family: Any = StraightThroughBernoulli if self.gradient == "straight_through" else dist.Bernoulli
        return pyro.sample("s", family(logits=self.logits).to_event(1))

    def options(self) -> dict[str, Any]:
        """Return how the gradient is estimated."""
        return {"gradient": self.gradient}

    def mean(self) -> dict[str, Tensor]:
        """Return the probability (D,) that each direction is kept."""
        return {"s": self.logits.sigmoid()}

    def _summary(self) -> dict[str, object]:
        return {"dim": self.logits.numel()} | self.options()

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "RankMaskGuide":
        """Rebuild the family; the caller fills its tensors."""
        return cls(torch.zeros_like(blora.adapter.loc), **options)
