"""Types of the arrays that metrics take, and the confidence of each row."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._probabilities import as_probabilities

Array = NDArray[Any]
"""Array of numbers."""
Labels = NDArray[np.integer]
"""Class indices (N,)."""


def confidence_and_correct(probs: Array, labels: Labels) -> tuple[Array, NDArray[np.bool_]]:
    """Return the largest probability of each row, and whether its class is the label."""
    probs, labels = as_probabilities(probs, labels)
    return probs.max(1), probs.argmax(1) == labels
