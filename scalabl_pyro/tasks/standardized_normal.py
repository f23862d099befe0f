"""A normal distribution whose parameters are those of the standardized variable."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class StandardizedNormal(dist.Normal):
    """Distribution of y = center + unit * z with z ~ Normal(loc, scale), in the units of y.

    Log densities are computed from z = (y - center) / unit, in the precision of ``loc``, and include the Jacobian
    -log(unit). They are therefore equal to those of the standardized variable up to that constant, even where y is much
    larger than its spread. Moments and samples have the precision float64, except with center 0 and unit 1.

    Args:
        loc: Mean of z, shape (...).
        scale: Standard deviation of z, positive.
        center: Number that was subtracted.
        unit: Positive number that was divided by.

    Example:
        >>> d = StandardizedNormal(torch.zeros(1), torch.ones(1), center=300_000.0, unit=10_000.0)
        >>> d.mean.item(), d.stddev.item(), round(d.log_prob(torch.tensor([310_000.0])).exp().item() * 10_000, 3)
        (300000.0, 10000.0, 0.242)
    """

    def __init__(self, loc: Tensor, scale: Tensor, *, center: float, unit: float) -> None:
        self.standard = dist.Normal(loc, scale, validate_args=False)
        self.center = center
        self.unit = unit
        scale = self.standard.scale if self._is_plain else unit * _wide(self.standard.scale)
        super().__init__(self._undo(self.standard.loc), scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log density of y, in nats."""
        z = value if self._is_plain else (_wide(value) - self.center) / self.unit
        return self.standard.log_prob(z.to(self.standard.loc.dtype)) - math.log(self.unit)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z and undo the standardization."""
        return self._undo(self.standard.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z with a gradient and undo the standardization."""
        return self._undo(self.standard.rsample(torch.Size(sample_shape)))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StandardizedNormal":
        """Return the distribution with a larger batch shape."""
        loc, scale = (x.expand(torch.Size(batch_shape)) for x in (self.standard.loc, self.standard.scale))
        return StandardizedNormal(loc, scale, center=self.center, unit=self.unit)

    @property
    def _is_plain(self) -> bool:
        return (self.center, self.unit) == (0.0, 1.0)

    def _undo(self, z: Tensor) -> Tensor:
        return z if self._is_plain else self.center + self.unit * _wide(z)


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # Apple's GPUs have no float64
