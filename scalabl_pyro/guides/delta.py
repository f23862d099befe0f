"""Point posterior: the mode of s (MAP), or s held where it starts."""

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ..model.bayesian_lora import BayesianLoRA
from .base import Guide


class DeltaGuide(Guide):
    """q(s) = Delta(loc).

    Args:
        loc: (D,) initial value.
        learn: learn loc, the MAP estimate under the prior; otherwise s stays a constant, as in plain LoRA.
    """

    family = "delta"
    has_density = False
    per_example = False  # all rows would carry the same value

    def __init__(self, loc: Tensor, *, learn: bool = True) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.detach().clone(), requires_grad=learn)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return loc as the site s."""
        return pyro.sample("s", dist.Delta(self.loc).to_event(1))

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "DeltaGuide":
        """The family again, its tensors to be filled."""
        return cls(blora.adapter.loc)

    def mean(self) -> dict[str, Tensor]:
        """Loc."""
        return {"s": self.loc}
