"""Point posterior: the mode of s (MAP), or s held at its initial value."""

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ..model.bayesian_lora import BayesianLoRA
from .base import Guide


class DeltaGuide(Guide):
    """q(s) = Delta(loc).

    Args:
        loc: Initial value (D,).
        learn: Whether to learn ``loc``, which gives the MAP estimate under the prior. If not, s stays constant, as in
            plain LoRA.

    Example:
        >>> import torch
        >>> guide = scalabl_pyro.guides.DeltaGuide(torch.ones(3))
        >>> guide.sample(2, seed=0)["s"].tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """

    family = "delta"
    has_density = False
    is_point = True
    per_example = False  # all rows would carry the same value

    def __init__(self, loc: Tensor, *, learn: bool = True) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone(), requires_grad=learn)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``loc`` as the site s, (D,)."""
        return pyro.sample("s", dist.Delta(self.loc).to_event(1))

    def mean(self) -> dict[str, Tensor]:
        """Return ``loc``."""
        return {"s": self.loc}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "DeltaGuide":
        """Rebuild the family; the caller fills its tensors."""
        return cls(blora.adapter.loc)
