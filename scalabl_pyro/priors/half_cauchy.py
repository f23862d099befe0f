"""The half-Cauchy distribution of the priors' scales, which a CUDA graph can hold."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import AbsTransform, Cauchy, TransformedDistribution


class HalfCauchy(dist.HalfCauchy):
    """Pyro's half-Cauchy distribution, made on the device of its scale alone.

    torch's constructor brings the location 0 from the host to the device, which a CUDA graph cannot hold.

    Args:
        scale: Medians, of any shape.
        validate_args: Whether to check arguments and values.
    """

    def __init__(self, scale: Tensor, validate_args: bool | None = None) -> None:
        base = Cauchy(torch.zeros_like(scale), scale, validate_args=False)
        TransformedDistribution.__init__(self, base, AbsTransform(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "HalfCauchy":
        """Give the distribution more independent copies."""
        return super().expand(batch_shape, _instance=type(self).__new__(type(self)) if _instance is None else _instance)
