"""The initial standard deviations of a guide."""

import torch
from torch import Tensor

from .._errors import check_scale

#: Default of the largest initial standard deviation. The paper starts at 0.05. From there, scales still rise when the
#: training ends, and validation likelihood and calibration are worse (docs/quality.md).
INIT_SCALE = 0.3


def draw_initial_scale(like: Tensor, init_scale: float, *, seed: int) -> Tensor:
    """Draw scale ~ Uniform(init_scale / sqrt(2), init_scale), independently for each entry.

    Args:
        like: Tensor (D,) that gives shape, dtype and device.
        init_scale: Largest initial standard deviation.
        seed: Seed of the draws, which are made on the CPU.

    Returns:
        Scales (D,).

    Raises:
        ValueError: ``init_scale`` is not positive and finite.

    References:
        Samplawski et al., UAI 2025, section 3 (posterior and initialization).
    """
    check_scale(init_scale=init_scale)
    uniform = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype).to(like.device)
    return init_scale * (0.5**0.5 + (1 - 0.5**0.5) * uniform)
