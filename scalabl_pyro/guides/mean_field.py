"""Factorized posteriors for priors that sample their own scales, or whose latents are bounded."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from .._process.random_state import scoped_seed
from ..model.bayesian_lora import BayesianLoRA
from ..priors import Prior
from ..priors.sites import check_continuous, prior_sites
from ..priors.supports import start_inside, to_support
from .base import Guide


class MeanFieldGuide(Guide):
    """q = product over sites of Normal(loc, diag(scale^2)), transformed to the support of each site.

    Real sites are normal and positive sites log-normal. For other supports, ``biject_to`` transforms the normal.

    Args:
        prior: Program whose latent sites the guide covers.
        start: Initial values by site. Other sites, and values outside of the support, start at the median of the prior.
        scale: Initial standard deviation of each unconstrained latent.
        hide: Sites to leave to another guide.

    Raises:
        ValueError: A latent of the prior is discrete.

    Example:
        >>> guide = scalabl_pyro.guides.MeanFieldGuide(blora.prior)
        >>> guide.mean()["s"].shape == (blora.subspace.dim,)
        True
    """

    family = "mean_field"
    factorized = True

    def __init__(
        self,
        prior: Prior,
        *,
        start: Mapping[str, Tensor] | None = None,
        scale: float = 0.05,
        hide: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.transforms: dict[str, Any] = {}
        sites = {name: site for name, site in prior_sites(prior).items() if name not in hide}
        check_continuous("A factorized guide", sites)
        for name, site in sites.items():
            transform = to_support(site["fn"])
            value = (start or {}).get(name, site["median"])
            with scoped_seed(0):
                value = start_inside(site["fn"], value)
            loc = transform.inv(value)
            self.transforms[name] = transform
            setattr(self, f"loc_{name}", nn.Parameter(loc.detach().clone()))
            setattr(self, f"scale_{name}", PyroParam(torch.full_like(loc, scale), constraint=constraints.positive))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every site; return s, or all sites by name where another guide covers s."""
        values = {}
        for name, transform in self.transforms.items():
            loc, scale = getattr(self, f"loc_{name}"), getattr(self, f"scale_{name}")
            values[name] = pyro.sample(name, _distribution(loc, scale, transform))
        return values.get("s", values)

    def mean(self) -> dict[str, Tensor]:
        """Return the median of each site, which is the mean of real sites."""
        return {name: transform(getattr(self, f"loc_{name}")) for name, transform in self.transforms.items()}

    def location(self) -> nn.Parameter | None:
        """Return the unconstrained location of s (D,); None where another guide covers s."""
        return getattr(self, "loc_s", None)

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "MeanFieldGuide":
        """Rebuild the family; the caller fills its tensors."""
        return cls(blora.prior)


class WithHyperparameters(Guide):
    """A guide for s, and a :class:`MeanFieldGuide` for all other latents of the prior.

    Args:
        of_s: Guide that covers ``"s"``.
        prior: Program that samples the latents.
        scale: Initial standard deviation of the other, unconstrained latents.

    Example:
        >>> from scalabl_pyro.guides import MeanFieldGuide, WithHyperparameters
        >>> guide = WithHyperparameters(MeanFieldGuide(blora.prior), blora.prior)
        >>> sorted(guide.mean())
        ['s']
    """

    family = "with_hyperparameters"
    factorized = True

    def __init__(self, of_s: Guide, prior: Prior, *, scale: float = 0.05) -> None:
        super().__init__()
        self.hyperparameters = MeanFieldGuide(prior, scale=scale, hide=("s",))
        self.of_s = of_s
        self.per_example = of_s.per_example
        self.has_density = of_s.has_density
        self.is_point = of_s.is_point
        self.scores_any_value = of_s.scores_any_value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the hyperparameters, then s."""
        self.hyperparameters()
        return self.of_s()

    def mean(self) -> dict[str, Tensor]:
        """Return the medians of the hyperparameters and the mean of s."""
        return {**self.hyperparameters.mean(), **self.of_s.mean()}

    def location(self) -> nn.Parameter | None:
        """Return the location parameter (D,) of the guide for s, such as the mean of a normal; None if it has none."""
        return self.of_s.location()

    def options(self) -> dict[str, Any]:
        """Return family and options of the guide for s."""
        return {"of_s": self.of_s.family, **self.of_s.options()}


def _distribution(loc: Tensor, scale: Tensor, transform: Any) -> Any:
    if _is_identity(transform):
        base: Any = dist.Normal(loc, scale)
    elif isinstance(transform, ExpTransform):
        base = dist.LogNormal(loc, scale)
    else:
        base = dist.TransformedDistribution(dist.Normal(loc, scale), [transform])
    return base.to_event(loc.dim() - base.event_dim)


def _is_identity(transform: Any) -> bool:
    return isinstance(transform, torch.distributions.transforms.ComposeTransform) and not transform.parts
