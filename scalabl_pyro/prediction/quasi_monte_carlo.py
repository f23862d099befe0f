"""Quasi-Monte Carlo draws: spread more evenly than independent draws, so fewer passes give the same Monte Carlo error.

Each draw alone still comes from q; together the draws cancel part of each other's error. Antithetic pairs, mean + e and
mean - e, cancel all terms that are odd in e, in any number of dimensions; for predictions these are most of the error.
Scrambled Sobol points fill the unit cube evenly, which needs many draws when D is large.
"""

from collections.abc import Callable, Iterator
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


#: Function that gives the next rows of noise, each (count, D).
NextNoise = Callable[[int], Tensor]


def quasi_monte_carlo_draws(guide: Guide, num_draws: int, *, seed: int, design: str) -> Draws:
    """Draw from a normal guide in an even design; see :func:`quasi_monte_carlo_parts`."""
    return next(quasi_monte_carlo_parts(guide, num_draws, size=num_draws, seed=seed, design=design))


def quasi_monte_carlo_parts(guide: Guide, num_draws: int, *, size: int, seed: int, design: str) -> Iterator[Draws]:
    """Draw from a normal guide in an even design, a part at a time.

    Args:
        guide: Guide of a normal family, without latents besides s.
        num_draws: Number S of draws. With an odd number, the last antithetic draw has no partner.
        size: Number of draws per part. The last part may have fewer.
        seed: Seed of the noise.
        design: ``"antithetic"`` or ``"sobol"``.

    Yields:
        Draws of one part.

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
    designs: dict[str, Callable[[int, int], NextNoise]] = {"antithetic": _antithetic, "sobol": _sobol}
    next_noise = designs[design](len(mean), as_seed(seed))
    density = torch.distributions.MultivariateNormal(mean.double(), scale_tril=tril)
    for start in range(0, num_draws, size):
        s = mean + (next_noise(min(size, num_draws - start)) @ tril.T).to(mean)
        yield Draws({"s": s}, log_q=density.log_prob(s.double()).to(mean), seed=seed)


def _antithetic(dim: int, seed: int) -> NextNoise:
    """Rows of noise e_1, -e_1, e_2, -e_2, ..."""
    generator = torch.Generator().manual_seed(seed)
    pending: list[Tensor] = []

    def next_noise(count: int) -> Tensor:
        while len(pending) < count:
            e = torch.randn(dim, generator=generator, dtype=torch.float64)
            pending.extend((e, -e))
        taken = torch.stack(pending[:count])
        del pending[:count]
        return taken

    return next_noise


def _sobol(dim: int, seed: int) -> NextNoise:
    """Rows of noise: standard normal quantiles of a scrambled Sobol sequence."""
    engine = SobolEngine(dim, scramble=True, seed=seed)

    def next_noise(count: int) -> Tensor:
        return torch.special.ndtri(engine.draw(count, dtype=torch.float64).clamp(1e-10, 1 - 1e-10))

    return next_noise
