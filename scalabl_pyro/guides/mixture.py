"""A mixture of guides with equal weights, such as the outcomes of restarts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from .base import Guide


class MixtureGuide(Guide):
    """q(s) = 1/K sum_k q_k(s).

    Args:
        components: the K guides.
    """

    family = "mixture"
    per_example = False

    def __init__(self, components: Sequence[Guide]) -> None:
        super().__init__()
        if not components:
            raise ValueError("A mixture needs at least one component.")
        self.components = nn.ModuleList(components)
        self.has_density = all(component.has_density for component in components)

    def __len__(self) -> int:
        return len(self.component_list())

    def component_list(self) -> list[Any]:
        """The components, without a param statement for each."""
        return list(self._modules["components"])  # type: ignore[call-overload]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample from a component at random."""
        components = self.component_list()
        return components[int(torch.randint(len(components), ()))]()

    def log_prob(self, sites: dict[str, Tensor]) -> Tensor:
        """Log density of one draw of all sites."""
        values = []
        for component in self.component_list():
            trace = poutine.trace(poutine.condition(component, data=sites)).get_trace()
            values.append(torch.as_tensor(trace.log_prob_sum()))
        return torch.logsumexp(torch.stack(values), dim=0) - math.log(len(values))

    def mean(self) -> dict[str, Tensor]:
        """The average of the components' means."""
        means = [component.mean() for component in self.component_list()]
        return {name: torch.stack([mean[name] for mean in means]).mean(0) for name in means[0]}

    def snapshot(self) -> Guide:
        """Snapshots of the components."""
        return MixtureGuide([component.snapshot() for component in self.component_list()])

    def options(self) -> dict[str, Any]:
        """Families and options of the components."""
        return {"components": [[c.family, c.options()] for c in self.component_list()]}
