"""Particles that move toward the posterior together: Stein variational gradient descent."""

import math
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._errors import check_count
from .base import Guide
from .empirical import EmpiricalGuide


class ParticleGuide(Guide):
    """K particles of s. :func:`scalabl_pyro.fit` moves all of them in every step.

    The posterior is their empirical measure, an :class:`EmpiricalGuide`.

    Args:
        loc: Center (D,) of the initial particles.
        scale: Standard deviations (D,) of the initial particles around ``loc``.
        num_particles: Number K of particles, 2 or more.
        seed: Seed of the initial particles.

    Raises:
        ValueError: ``num_particles`` is less than 2.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.ParticleGuide(torch.zeros(3), torch.ones(3), num_particles=4)
        >>> guide.particles.shape
        torch.Size([4, 3])

    References:
        Liu and Wang, Stein variational gradient descent, NeurIPS 2016.
    """

    family = "particles"
    per_example = False
    has_density = False
    method: Literal["SVI", "SVGD"] = "SVGD"

    def __init__(self, loc: Tensor, scale: Tensor, *, num_particles: int = 8, seed: int = 0) -> None:
        super().__init__()
        check_count(num_particles=num_particles, least=2)  # one particle alone has no other to repel
        noise = torch.randn(num_particles, len(loc), generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
        self.particles = nn.Parameter((loc + scale * noise.to(loc.device)).detach())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample one particle at random; :func:`scalabl_pyro.fit` uses all of them instead."""
        particle = self.particles[int(torch.randint(len(self.particles), ()))]
        return pyro.sample("s", dist.Delta(particle).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """Return the average particle."""
        return {"s": self.particles.mean(0)}

    def _summary(self) -> dict[str, object]:
        return {"num_particles": len(self.particles), "dim": self.particles.shape[1]}

    def snapshot(self) -> Guide:
        """Return the particles as an :class:`EmpiricalGuide`."""
        return EmpiricalGuide({"s": self.particles.detach().cpu()}, num_chains=None)

    def stein_gradient(self, score: Tensor) -> Tensor:
        """Compute the direction (K, D) that decreases KL(q || p) fastest in the space of the kernel.

        phi(s_i) = 1/K sum_j [ k(s_j, s_i) score_j + d k(s_j, s_i) / d s_j ] with k(a, b) = exp(-|a - b|^2 / h), where h
        is the median of the squared distances divided by log(K + 1) (Liu and Wang, 2016, eq. 8).

        Args:
            score: Gradient (K, D) of the log joint at each particle.
        """
        points = self.particles.detach()
        count = len(points)
        difference = points.unsqueeze(0) - points.unsqueeze(1)  # [j, i] = s_i - s_j
        squares = difference.square().sum(-1)
        off_diagonal = squares[~torch.eye(count, dtype=torch.bool, device=squares.device)]
        width = (off_diagonal.median() / math.log(count + 1)).clamp_min(1e-12)
        kernel = torch.exp(-squares / width)
        repulsion = (kernel.unsqueeze(-1) * difference).sum(0) * 2 / width
        return (kernel.T @ score + repulsion) / count
