"""Plots of a fit and of its predictions.

Each function draws on the given axes, or on new ones, and returns the axes. It does not show or save the figure. Lines,
markers and hatches differ as well as colors, so that a print without color can be read.
"""

from .calibration import reliability
from .latents import posterior_by_layer
from .mistakes import confident_mistakes
from .selection import risk_coverage
from .shaded_text import tokens
from .style import MARK as MARK
from .style import QUIET as QUIET
from .style import WARM as WARM
from .training import history, loss
from .uncertainty import uncertainty_histogram

__all__ = [
    "confident_mistakes",
    "history",
    "loss",
    "posterior_by_layer",
    "reliability",
    "risk_coverage",
    "tokens",
    "uncertainty_histogram",
]
