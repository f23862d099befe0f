"""The scale of a normal prior, chosen by the Laplace evidence."""

import logging
import math

import numpy as np
from torch import Tensor

logger = logging.getLogger(__name__)

#: Range of the scales that are tried.
SMALLEST_SCALE, LARGEST_SCALE = 1e-3, 1e3


def scale_of_largest_evidence(eigenvalues: Tensor, sum_of_squares: float, *, num_scales: int = 2001) -> float:
    """Find the scale of the prior Normal(0, scale) under which the Laplace evidence at a mode is largest.

    log evidence = const - |w|^2 / (2 scale^2) - 1/2 sum_i log(1 + scale^2 h_i), for weights w at the mode and
    eigenvalues h_i of the curvature of the negative log likelihood there. Directions without curvature add nothing.
    The scales are spaced evenly in their logarithm from 1e-3 to 1e3. A warning is logged if an end of this range wins.

    Args:
        eigenvalues: Eigenvalues of the curvature. Negative ones, which are rounding errors, count as 0.
        sum_of_squares: |w|^2.
        num_scales: Number of scales to try.

    References:
        MacKay, Bayesian interpolation, Neural Computation 1992.
    """
    scales = np.exp(np.linspace(math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE), num_scales))
    curved = eigenvalues.double().flatten()
    curved = curved[curved > 0]
    evidence = [
        -0.5 * sum_of_squares / scale**2 - 0.5 * float((scale**2 * curved).log1p().sum()) for scale in scales.tolist()
    ]
    best = int(np.argmax(evidence))
    if best in (0, num_scales - 1):
        logger.warning(
            "the evidence chose the prior scale %.3g, an end of its range, so the data do not determine it; "
            "pass prior_scale as a number",
            scales[best],
        )
    return float(scales[best])
