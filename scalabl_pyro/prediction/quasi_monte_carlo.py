"""Draws that are spread more evenly than independent ones, so that fewer passes give the same Monte Carlo error.

Each draw alone still comes from q; together they cancel part of each other's error. Antithetic pairs, mean + e and
mean - e, cancel all that is odd in e, in any number of dimensions: for predictions that is most of it. Scrambled Sobol
points fill the cube evenly, which takes many draws once D is large.
"""

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from ..guides import Guide
from .draws import Draws

DESIGNS = ("independent", "antithetic", "sobol")


def quasi_monte_carlo_draws(guide: Guide, num_draws: int, *, seed: int, design: str) -> Draws:
    """Draws of a normal guide in an even design.

    Args:
        guide: of a normal family without latents besides s.
        num_draws: S; an odd number leaves the last antithetic draw without its partner.
        seed: of the noise.
        design: ``"antithetic"`` or ``"sobol"``.

    Raises:
        TypeError: a family that is not normal.

    References:
        Ren et al., Antithetic sampling in deep generative models, UAI 2019; Owen, Scrambled Sobol points, 1998.
    """
    means = guide.mean()
    if set(means) != {"s"}:
        raise TypeError(
            f"design={design!r} knows posteriors of s alone; this one has {sorted(means)}: use 'independent'."
        )
    mean = means["s"].detach()
    tril = torch.linalg.cholesky(guide.covariance().detach().double())
    noise = {"antithetic": _antithetic, "sobol": _sobol}[design](num_draws, len(mean), seed)
    s = mean + (noise @ tril.T).to(mean)
    log_q = torch.distributions.MultivariateNormal(mean.double(), scale_tril=tril).log_prob(s.double()).to(mean)
    return Draws({"s": s}, log_q=log_q, seed=seed)


def _antithetic(num_draws: int, dim: int, seed: int) -> Tensor:
    """(S, D): e_1, -e_1, e_2, -e_2, ..."""
    generator = torch.Generator().manual_seed(seed)
    half = [torch.randn(dim, generator=generator, dtype=torch.float64) for _ in range(-(-num_draws // 2))]
    return torch.stack([sign * e for e in half for sign in (1, -1)])[:num_draws]


def _sobol(num_draws: int, dim: int, seed: int) -> Tensor:
    """(S, D) standard normal scores of a scrambled Sobol sequence."""
    u = SobolEngine(dim, scramble=True, seed=seed).draw(num_draws, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-10, 1 - 1e-10))
