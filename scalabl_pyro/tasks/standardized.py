"""Distributions of y = center + unit * z, where z is the standardized variable."""

import math
from typing import Any

import torch
from torch import Tensor


class Standardized:
    """Mixin for a location-scale distribution of y that is computed by that of the standardized variable z.

    Log densities are computed from z = (y - center) / unit, in the precision of the location of z, and include the
    Jacobian -log(unit). They are therefore equal to those of the standardized variable up to that constant, even where
    y is much larger than its spread. Samples have the precision float64, except with center 0 and unit 1.

    Attributes:
        standard: Distribution of z.
        center: Number that was subtracted.
        unit: Positive number that was divided by.
    """

    standard: Any
    center: float
    unit: float

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

    @property
    def _is_plain(self) -> bool:
        return (self.center, self.unit) == (0.0, 1.0)

    def _undo(self, z: Tensor) -> Tensor:
        return z if self._is_plain else self.center + self.unit * _wide(z)

    def _scaled(self, scale: Tensor) -> Tensor:
        return scale if self._is_plain else self.unit * _wide(scale)


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # Apple's GPUs have no float64
