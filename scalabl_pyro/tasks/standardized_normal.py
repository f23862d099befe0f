"""A normal distribution whose parameters are those of the standardized variable."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .standardized import Standardized


class StandardizedNormal(Standardized, dist.Normal):
    """Distribution of y = center + unit * z with z ~ Normal(loc, scale), in the units of y.

    See :class:`~scalabl_pyro.tasks.standardized.Standardized` for its precision. Moments have the precision float64,
    except with center 0 and unit 1.

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
        dist.Normal.__init__(
            self, self._undo(self.standard.loc), self._scaled(self.standard.scale), validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> "StandardizedNormal":
        """Return the distribution with a larger batch shape."""
        loc, scale = (x.expand(torch.Size(batch_shape)) for x in (self.standard.loc, self.standard.scale))
        return StandardizedNormal(loc, scale, center=self.center, unit=self.unit)
