"""The KL of the released ScalaBL code: its distribution of s, its direction, and its weight in each step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._errors import check_count, check_positive
from ..guides import NormalGuide
from ..guides.initial_scale import draw_initial_scale

#: The released code stores the logarithm of the prior mean, so the mean cannot be 0.
PRIOR_LOC, PRIOR_SCALE = 1e-8, 1.0


@dataclass(frozen=True)
class KLReweighting:
    """KL weights of BLoB and the released ScalaBL: pi_i = 2^i / (2^(M+1) - 1) for i = 1..M, repeated every M steps.

    The weights of one period sum to nearly 1. The period is M = int(100 N^(pi / gamma) / batch_size), which differs
    from the number of batches per epoch (N / batch_size). Only about the last ten of M steps have a weight above 0.001.
    The mean weight per step, about 1 / M, is larger than the 1 / N of the ELBO.

    A call returns the weight in the unit of :func:`scalabl_pyro.fit`, whose loss is NLL + kl_weight * KL / N.

    Attributes:
        num_data: Number of training rows N.
        batch_size: Rows per step.
        gamma: Constant in the exponent of N. The released code uses 8.

    References:
        Wang et al., BLoB, NeurIPS 2024, section 3.3; N and gamma as in the released code.

    Example:
        >>> schedule = scalabl_pyro.baselines.KLReweighting(num_data=len(train_data), batch_size=16)
        >>> scalabl_pyro.baselines.blob(llm, task, train_data, batch_size=16, kl_weight=schedule)
    """

    num_data: int
    batch_size: int
    gamma: float = 8.0

    def __post_init__(self) -> None:
        check_count(num_data=self.num_data, batch_size=self.batch_size)
        check_positive(gamma=self.gamma)

    @property
    def period(self) -> int:
        """Length M of the period in steps, at least 1."""
        return max(int(100 * self.num_data ** (math.pi / self.gamma) / self.batch_size), 1)

    def share(self, step: int) -> float:
        """Return the weight pi_i of a step. Steps count from 0."""
        i = step % self.period + 1
        return math.exp2(i - self.period - 1) / (1 - math.exp2(-self.period - 1))

    def __call__(self, step: int) -> float:
        """Return N pi_i, the weight in the unit of :func:`scalabl_pyro.fit`."""
        return self.num_data * self.share(step)


class LogNormals(nn.Module):
    """Posterior q(s) = Normal(exp(log_loc), exp(log_scale)) of the released code, whose means are always positive.

    Args:
        loc: Initial means (D,).
        init_scale: Largest initial standard deviation.
        seed: Seed of the initial standard deviations.
    """

    def __init__(self, loc: Tensor, *, init_scale: float, seed: int) -> None:
        super().__init__()
        self.log_loc = nn.Parameter(loc.log())
        self.log_scale = nn.Parameter(draw_initial_scale(loc, init_scale, seed=seed).log())

    def draw(self) -> Tensor:
        """Return one reparametrized draw (D,)."""
        return self.log_loc.exp() + self.log_scale.exp() * torch.randn_like(self.log_scale)

    def kl(self) -> Tensor:
        """Return KL(prior || q) in nats."""
        return reversed_kl(self.log_loc.exp(), self.log_scale.exp())

    @torch.no_grad()
    def guide(self) -> NormalGuide:
        """Return the same distribution as a guide of this package."""
        return NormalGuide(self.log_loc.exp(), self.log_scale.exp())


def reversed_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """Return KL(p || q) = sum of log(scale / sp) + (sp^2 + (mp - loc)^2) / (2 scale^2) - 1/2.

    The ELBO has KL(q || p) instead. Here mp and sp are mean and standard deviation of the prior p.
    """
    moments = (PRIOR_SCALE**2 + (PRIOR_LOC - loc).square()) / (2 * scale.square())
    return ((scale / PRIOR_SCALE).log() + moments - 0.5).sum()
