"""Particles that are moved toward the posterior together: Stein variational gradient descent."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .base import Guide
from .empirical import EmpiricalGuide


class ParticleGuide(Guide):
    """K points of s, all used in every step of :func:`scalabl_pyro.fit`; the posterior is their empirical measure.

    Args:
        loc: (D,) where they start.
        scale: (D,) standard deviation of their start around it.
        num_particles: K.
        seed: of the start.

    References:
        Liu and Wang, Stein variational gradient descent, NeurIPS 2016.
    """

    family = "particles"
    per_example = False
    has_density = False

    def __init__(self, loc: Tensor, scale: Tensor, *, num_particles: int = 8, seed: int = 0) -> None:
        super().__init__()
        if num_particles < 2:
            raise ValueError(f"num_particles={num_particles}: particles that repel each other are 2 or more.")
        noise = torch.randn(num_particles, len(loc), generator=torch.Generator().manual_seed(seed), dtype=loc.dtype)
        self.particles = nn.Parameter((loc + scale * noise.to(loc.device)).detach())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample a particle at random; :func:`scalabl_pyro.fit` takes all of them in every step instead."""
        particle = self.particles[int(torch.randint(len(self.particles), ()))]
        return pyro.sample("s", dist.Delta(particle).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """The average particle."""
        return {"s": self.particles.mean(0)}

    def snapshot(self) -> Guide:
        """The particles as points."""
        return EmpiricalGuide({"s": self.particles.detach().cpu()}, num_chains=None)

    def stein_gradient(self, score: Tensor) -> Tensor:
        """The direction (K, D) that decreases KL(q || p) fastest in the kernel's space.

        phi(s_i) = 1/K sum_j [ k(s_j, s_i) score_j + d k(s_j, s_i) / d s_j ] with k(a, b) = exp(-|a - b|^2 / h) and h
        the median of the squared distances over log (K + 1) (Liu and Wang, 2016, eq. 8).

        Args:
            score: (K, D) gradient of the log joint at each particle.
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
