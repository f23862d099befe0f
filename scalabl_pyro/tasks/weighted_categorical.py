"""A categorical distribution whose log probabilities count more for some classes than for others."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from .._values import number, shown


class WeightedCategorical(dist.Categorical):
    """Categorical distribution with ``log_prob(y) = weight_y * log p(y)``. Its probabilities are those without weights.

    Args:
        logits: Logits, (..., C).
        weights: Weight of each class, (C,).

    Example:
        >>> d = WeightedCategorical(torch.zeros(2), torch.tensor([1.0, 3.0]))
        >>> d.probs, d.log_prob(torch.tensor(1)) / torch.tensor(0.5).log()
        (tensor([0.5000, 0.5000]), tensor(3.))
    """

    def __init__(self, logits: Tensor, weights: Tensor) -> None:
        self.weights = weights
        super().__init__(logits=logits)

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the weighted log probability, in nats."""
        return super().log_prob(value) * self.weights[value.long()]

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WeightedCategorical":
        """Return the distribution with a larger batch shape."""
        return WeightedCategorical(self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]), self.weights)


def check_class_weights(weights: Any, num_classes: int) -> Literal["balanced"] | tuple[float, ...] | None:
    """Check the weights of classes.

    Args:
        weights: None, ``"balanced"``, or one positive finite number per class.
        num_classes: Number of classes.

    Raises:
        ValueError: They are something else.

    Example:
        >>> check_class_weights([1, 3], 2)
        (1.0, 3.0)
    """
    if weights is None or (isinstance(weights, str) and weights == "balanced"):
        return cast(Any, weights)
    found = tuple(map(number, weights)) if isinstance(weights, list | tuple | np.ndarray) else ()
    if len(found) != num_classes or not all(w is not None and 0 < w < float("inf") for w in found):
        raise ValueError(
            f"class_weights={shown(weights)}: expected 'balanced', or one positive finite number for each of the "
            f"{num_classes} classes, in their order."
        )
    return cast(tuple[float, ...], found)


def balanced_weights(targets: Sequence[float | int], num_classes: int) -> tuple[float, ...]:
    """Return weights by which all classes count alike: N / (C * N_c), and 1 for a class without rows.

    Args:
        targets: Class indices of N rows.
        num_classes: Number C of classes.

    Example:
        >>> balanced_weights([0, 0, 0, 1], 2)
        (0.6666666666666666, 2.0)
    """
    counts = np.bincount(np.asarray(targets, dtype=np.int64), minlength=num_classes)
    return tuple(len(targets) / (num_classes * int(count)) if count else 1.0 for count in counts)
