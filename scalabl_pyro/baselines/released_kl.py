"""The schedule by which BLoB and the released ScalaBL weigh the KL of each batch (Wang et al., 2024, section 3.3)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._errors import check_positive
from ..guides import NormalGuide

#: Its mean is stored as a logarithm there, so it cannot be 0.
PRIOR_LOC, PRIOR_SCALE = 1e-8, 1.0


@dataclass(frozen=True)
class KLReweighting:
    """Weights pi_i = 2^i / (2^(M+1) - 1), i = 1..M, again and again; they sum to nearly 1 over M steps.

    M = int(100 N^(pi / gamma) / batch_size), which is not the number of batches of an epoch (N / batch_size). Only the
    last ten or so of M steps have a weight worth the name, and one M-th of the KL a step is more than the ELBO's N-th.

    Calling it gives the weight in the unit of :func:`scalabl_pyro.fit`, whose loss is NLL + kl_weight * KL / N:
    ``fit(..., kl_weight=KLReweighting(num_data=N, batch_size=16))``.

    Attributes:
        num_data: N, rows of the training set.
        batch_size: rows a step.
        gamma: 8 in the released code.
    """

    num_data: int
    batch_size: int
    gamma: float = 8.0

    def __post_init__(self) -> None:
        check_positive(num_data=self.num_data, batch_size=self.batch_size, gamma=self.gamma)

    @property
    def period(self) -> int:
        """M, at least 1."""
        return max(int(100 * self.num_data ** (math.pi / self.gamma) / self.batch_size), 1)

    def share(self, step: int) -> float:
        """pi_i of step ``step``, counted from 0."""
        i = step % self.period + 1
        return math.exp2(i - self.period - 1) / (1 - math.exp2(-self.period - 1))

    def __call__(self, step: int) -> float:
        """N pi_i."""
        return self.num_data * self.share(step)


class LogNormals(nn.Module):
    """q(s) = Normal(exp(log_loc), exp(log_scale)): means, too, are positive there.

    Args:
        loc: (D,) initial means.
        init_scale: largest initial standard deviation.
        seed: of the initial standard deviations.
    """

    def __init__(self, loc: Tensor, *, init_scale: float, seed: int) -> None:
        super().__init__()
        uniform = torch.rand(loc.shape, generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
        self.log_loc = nn.Parameter(loc.log())
        self.log_scale = nn.Parameter((init_scale * (0.5**0.5 + (1 - 0.5**0.5) * uniform)).log())

    def draw(self) -> Tensor:
        """(D,) one draw, reparametrized."""
        return self.log_loc.exp() + self.log_scale.exp() * torch.randn_like(self.log_scale)

    def kl(self) -> Tensor:
        """KL(prior || q), nats."""
        return reversed_kl(self.log_loc.exp(), self.log_scale.exp())

    @torch.no_grad()
    def guide(self) -> NormalGuide:
        """The same family in the library's words."""
        return NormalGuide(self.log_loc.exp(), self.log_scale.exp())


def reversed_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(p || q) = sum of log(scale / sp) + (sp^2 + (mp - loc)^2) / (2 scale^2) - 1/2, the wrong way round."""
    moments = (PRIOR_SCALE**2 + (PRIOR_LOC - loc).square()) / (2 * scale.square())
    return ((scale / PRIOR_SCALE).log() + moments - 0.5).sum()
