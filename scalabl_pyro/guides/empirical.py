"""A posterior given by points: MCMC draws, or particles."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..model.bayesian_lora import BayesianLoRA
from .base import Guide


class EmpiricalGuide(Guide):
    """q(s) = one of K points, each with probability 1 / K.

    A posterior draws the points in a random order and each once before any comes again, so K draws are the K points.

    Args:
        points: latent sites, each (K, ...); chains of MCMC stand one behind the other.
        num_chains: into how many chains the points divide; None for points that are no chain, such as particles.
    """

    family = "empirical"
    per_example = False
    has_density = False

    def __init__(self, points: dict[str, Tensor], *, num_chains: int | None = 1) -> None:
        super().__init__()
        sizes = {len(value) for value in points.values()}
        if "s" not in points or len(sizes) != 1 or next(iter(sizes)) % (num_chains or 1):
            raise ValueError(
                f"points has {sorted(points)} of {sorted(sizes)} points in {num_chains} chains: it needs 's', one "
                "number of points for all sites, and chains of equal length."
            )
        self.sites = tuple(points)
        self.num_chains = num_chains
        for name, value in points.items():
            setattr(self, f"points_{name}", nn.Parameter(value.detach().clone(), requires_grad=False))

    def __len__(self) -> int:
        return len(self.points("s"))

    def points(self, name: str) -> Tensor:
        """(K, ...) points of a site."""
        return getattr(self, f"points_{name}")

    def at(self, index: int) -> dict[str, Tensor]:
        """Point number ``index``, counted round."""
        return {name: self.points(name)[index % len(self)] for name in self.sites}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample a point at random."""
        index = int(torch.randint(len(self), ()))
        values = {}
        for name, value in self.at(index).items():
            values[name] = pyro.sample(name, dist.Delta(value).to_event(value.dim()))
        return values["s"]

    def mean(self) -> dict[str, Tensor]:
        """The average point."""
        return {name: self.points(name).mean(0) for name in self.sites}

    def options(self) -> dict[str, Any]:
        """Sites with their shapes, and the number of chains."""
        return {"num_chains": self.num_chains, "shapes": {name: list(self.points(name).shape) for name in self.sites}}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "EmpiricalGuide":
        """The family again, its points to be filled."""
        shapes = options.get("shapes")
        if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
            raise ValueError(f"shapes={shapes!r} must give the shape of each site.")
        points = {str(name): torch.zeros(shape) for name, shape in shapes.items()}
        return cls(points, num_chains=options.get("num_chains", 1))


def _is_shape(shape: Any) -> bool:
    sizes = isinstance(shape, list) and bool(shape) and all(isinstance(n, int) and n >= 1 for n in shape)
    return sizes and torch.Size(shape).numel() <= 10**9
