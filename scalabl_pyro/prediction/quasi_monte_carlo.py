"""Quasi-Monte Carlo draws: spread more evenly than independent draws, so fewer passes give the same Monte Carlo error.

Each draw alone still comes from q; together the draws cancel part of each other's error. Antithetic pairs, mean + e and
mean - e, cancel all terms that are odd in e, in any number of dimensions; for predictions these are most of the error.
Scrambled Sobol points fill the unit cube evenly, which needs many draws when D is large.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .._process.random_state import as_seed
from ..guides import Guide
from .draws import Draws

#: How draws relate to each other.
Design = Literal["independent", "antithetic", "sobol"]
DESIGNS: tuple[str, ...] = get_args(Design)


def quasi_monte_carlo_draws(guide: Guide, num_draws: int, *, seed: int, design: str) -> Draws:
    """Draw from a normal guide in an even design.

    Args:
        guide: Guide of a normal family, without latents besides s.
        num_draws: Number S of draws. With an odd number, the last antithetic draw has no partner.
        seed: Seed of the noise.
        design: ``"antithetic"`` or ``"sobol"``.

    Raises:
        TypeError: The family is not normal, or it has latents besides s.

    References:
        Ren et al., Adaptive antithetic sampling for variance reduction, ICML 2019; Owen, Scrambling Sobol' and
        Niederreiter-Xing points, 1998.
    """
    means = guide.mean()
    if set(means) != {"s"}:
        raise TypeError(
            f"design={design!r} is for posteriors of s alone; this one has the latents {sorted(means)}: use "
            "'independent'."
        )
    mean = means["s"].detach()
    tril = torch.linalg.cholesky(guide.covariance().detach().double())
    builders: dict[str, Callable[[int, int, int], Tensor]] = {"antithetic": _antithetic, "sobol": _sobol}
    noise = builders[design](num_draws, len(mean), as_seed(seed))
    s = mean + (noise @ tril.T).to(mean)
    log_q = torch.distributions.MultivariateNormal(mean.double(), scale_tril=tril).log_prob(s.double()).to(mean)
    return Draws({"s": s}, log_q=log_q, seed=seed)


def _antithetic(num_draws: int, dim: int, seed: int) -> Tensor:
    """Noise (S, D): e_1, -e_1, e_2, -e_2, ..."""
    generator = torch.Generator().manual_seed(seed)
    half = [torch.randn(dim, generator=generator, dtype=torch.float64) for _ in range(-(-num_draws // 2))]
    return torch.stack([sign * e for e in half for sign in (1, -1)])[:num_draws]


def _sobol(num_draws: int, dim: int, seed: int) -> Tensor:
    """Noise (S, D): standard normal quantiles of a scrambled Sobol sequence."""
    u = SobolEngine(dim, scramble=True, seed=seed).draw(num_draws, dtype=torch.float64)
    return torch.special.ndtri(u.clamp(1e-10, 1 - 1e-10))
