"""Posterior given by points: MCMC draws, or particles."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._errors import check_count
from .._process.random_state import as_seed
from ..model.bayesian_lora import BayesianLoRA
from .base import Guide

#: Largest number of values that a saved file may ask for per site. A larger one only exhausts memory.
MAX_VALUES = 10**9


class EmpiricalGuide(Guide):
    """q(s) = one of K points, each with probability 1 / K.

    :meth:`sample` takes the points in a random order without replacement, and starts again after K draws. So K draws
    are the K points.

    Args:
        points: Points by latent site, each (K, ...). MCMC chains follow one another: first all draws of chain 0.
        num_chains: Number of chains that the points divide into; None if the points are not a chain, such as particles.
        statistics: What the sampler recorded of each point, (K,) by name, such as ``"energy"``. ``to_arviz`` exports it
            as ``sample_stats``.

    Raises:
        ValueError: ``"s"`` is missing, sites or statistics differ in K, or ``num_chains`` does not divide K.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.EmpiricalGuide({"s": torch.arange(4.0).reshape(4, 1)}, num_chains=2)
        >>> sorted(guide.sample(4, seed=0)["s"].flatten().tolist())
        [0.0, 1.0, 2.0, 3.0]
    """

    family = "empirical"
    per_example = False
    has_density = False

    def __init__(
        self,
        points: dict[str, Tensor],
        *,
        num_chains: int | None = 1,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if num_chains is not None:
            check_count(num_chains=num_chains)
        sizes = {len(value) for value in points.values()}
        if "s" not in points or len(sizes) != 1 or next(iter(sizes)) % (num_chains or 1):
            raise ValueError(
                f"points has the sites {sorted(points)} with {sorted(sizes)} points, and num_chains={num_chains}: give "
                "a site 's', the same number of points for all sites, and chains of equal length."
            )
        self.sites = tuple(points)
        self.num_chains = None if num_chains is None else int(num_chains)
        for name, value in points.items():
            setattr(self, f"points_{name}", nn.Parameter(value.detach().clone(), requires_grad=False))
        self.recorded = tuple(statistics or {})
        for name, value in (statistics or {}).items():
            if value.shape != (len(self),):
                raise ValueError(
                    f"The statistic {name!r} has shape {tuple(value.shape)}: expected one number per point."
                )
            setattr(
                self,
                f"statistic_{name}",
                nn.Parameter(value.detach().to(points["s"].dtype, copy=True), requires_grad=False),
            )

    def __len__(self) -> int:
        return len(self.points("s"))

    def points(self, name: str) -> Tensor:
        """Return the points (K, ...) of a site."""
        return getattr(self, f"points_{name}")

    def at(self, index: int) -> dict[str, Tensor]:
        """Return point ``index`` modulo K by site."""
        return {name: self.points(name)[index % len(self)] for name in self.sites}

    def chains(self) -> dict[str, Tensor] | None:
        """Return the points by site, each (chains, draws, ...); None if they are not chains."""
        if self.num_chains is None:
            return None
        return {name: self.points(name).detach().unflatten(0, (self.num_chains, -1)) for name in self.sites}

    def statistics(self) -> dict[str, Tensor]:
        """Return what the sampler recorded, (chains, draws) by name; empty if it recorded nothing."""
        return {
            name: getattr(self, f"statistic_{name}").detach().unflatten(0, (self.num_chains or 1, -1))
            for name in self.recorded
        }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample one point at random, with replacement."""
        index = int(torch.randint(len(self), ()))
        values = {}
        for name, value in self.at(index).items():
            values[name] = pyro.sample(name, dist.Delta(value).to_event(value.dim()))
        return values["s"]

    def sample_and_log_prob(self, num_draws: int, *, seed: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """Take points in a random order, each once before any comes again; points have no density."""
        check_count(num_draws=num_draws)
        return next(self.sample_in_parts(num_draws, size=num_draws, seed=seed)), None

    def sample_in_parts(self, num_draws: int, *, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Take points as :meth:`sample_and_log_prob` does, a part at a time."""
        check_count(num_draws=num_draws, size=size)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(as_seed(seed)))
        for start in range(0, num_draws, size):
            index = order[torch.arange(start, min(start + size, num_draws)) % len(order)]
            yield {name: self.points(name).detach()[index] for name in self.sites}

    def mean(self) -> dict[str, Tensor]:
        """Return the average point by site."""
        return {name: self.points(name).mean(0) for name in self.sites}

    def options(self) -> dict[str, Any]:
        """Return the shape of each site, the number of chains, and the names of the statistics if there are any."""
        shapes = {name: list(self.points(name).shape) for name in self.sites}
        options: dict[str, Any] = {"num_chains": self.num_chains, "shapes": shapes}
        return options | ({"statistics": list(self.recorded)} if self.recorded else {})

    def _summary(self) -> dict[str, object]:
        return {"dim": self.points("s").shape[-1], "points": len(self), "num_chains": self.num_chains}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "EmpiricalGuide":
        """Rebuild the family; the caller fills its points.

        Raises:
            ValueError: The shapes are not lists of positive whole numbers, or too large, or names are not texts.
        """
        shapes = options.get("shapes")
        if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
            raise ValueError(f"shapes={shapes!r} must map each site to its shape, a list of positive whole numbers.")
        names = options.get("statistics", [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
            raise ValueError(f"statistics={names!r} must be a list of names.")
        points = {str(name): torch.zeros(shape) for name, shape in shapes.items()}
        statistics = {name: torch.zeros(len(points["s"])) for name in names} if "s" in points else {}
        return cls(points, num_chains=options.get("num_chains", 1), statistics=statistics)


def _is_shape(shape: Any) -> bool:
    is_list = isinstance(shape, list) and bool(shape) and all(isinstance(n, int) and n >= 1 for n in shape)
    return is_list and torch.Size(shape).numel() <= MAX_VALUES
