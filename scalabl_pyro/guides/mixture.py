"""Mixture of guides with equal weights, such as the results of restarts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Guide


class MixtureGuide(Guide):
    """Mixture of K guides q_1, ..., q_K with equal weights: q(s) = 1/K sum_k q_k(s).

    Args:
        components: The K guides, at least one.

    Raises:
        ValueError: ``components`` is empty.

    Example:
        >>> import torch
        >>> from scalabl_pyro.guides import DeltaGuide, MixtureGuide
        >>> guide = MixtureGuide([DeltaGuide(torch.zeros(2)), DeltaGuide(torch.ones(2))])
        >>> guide.mean()["s"].tolist()
        [0.5, 0.5]
    """

    family = "mixture"
    per_example = False

    def __init__(self, components: Sequence[Guide]) -> None:
        super().__init__()
        if not components:
            raise ValueError("A mixture needs at least one component, got none.")
        self.components = nn.ModuleList(components)
        # The density of a draw needs the densities of all components, not only of the one that made the draw.
        self.has_density = all(component.has_density and component.scores_any_value for component in components)

    def __len__(self) -> int:
        return len(self.component_list())

    def component_list(self) -> list[Guide]:
        """Return the components; unlike the attribute ``components``, without a Pyro param statement for each."""
        return list(self._modules["components"])  # type: ignore[call-overload]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample from one component, chosen at random."""
        components = self.component_list()
        return components[int(torch.randint(len(components), ()))]()

    def log_prob(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Give the log density of values of all latent sites, see :meth:`Guide.log_prob`."""
        values = torch.stack([component.log_prob(sites) for component in self.component_list()])
        return torch.logsumexp(values, dim=0) - math.log(len(values))

    def mean(self) -> dict[str, Tensor]:
        """Return the average of the components' means."""
        means = [component.mean() for component in self.component_list()]
        return {name: torch.stack([mean[name] for mean in means]).mean(0) for name in means[0]}

    def _summary(self) -> dict[str, object]:
        return {"components": [type(c).__name__ for c in self.component_list()]}

    def snapshot(self) -> Guide:
        """Return a mixture of the components' snapshots."""
        return MixtureGuide([component.snapshot() for component in self.component_list()])

    def options(self) -> dict[str, Any]:
        """Return family and options of each component."""
        return {"components": [[c.family, c.options()] for c in self.component_list()]}

    def _log_density(self, own: Tensor, sites: Mapping[str, Tensor]) -> Tensor:
        return self.log_prob(sites)
