"""Factorized posteriors for priors with scales of their own, or with latents that are not on the whole real line."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ExpTransform

from ..model.bayesian_lora import BayesianLoRA
from ..priors import Prior
from ..priors.sites import check_continuous, prior_sites
from .base import Guide


class MeanFieldGuide(Guide):
    """q = product over sites of Normal(loc, diag(scale^2)), carried to the support of the site.

    Real sites are normal, positive ones log-normal, others whatever ``biject_to`` makes of a normal.

    Args:
        prior: the program whose sites are covered.
        start: initial values by site, in the support; others start at the median of the prior.
        scale: initial standard deviation of each unconstrained latent.
        hide: sites that another guide covers.
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
            transform = biject_to(_event_support(site["fn"]))
            value = (start or {}).get(name, site["median"])
            loc = transform.inv(value)
            self.transforms[name] = transform
            setattr(self, f"loc_{name}", nn.Parameter(loc.detach().clone()))
            setattr(self, f"scale_{name}", PyroParam(torch.full_like(loc, scale), constraint=constraints.positive))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every site; return s, or all sites by name where s is covered elsewhere."""
        values = {}
        for name, transform in self.transforms.items():
            loc, scale = getattr(self, f"loc_{name}"), getattr(self, f"scale_{name}")
            values[name] = pyro.sample(name, _distribution(loc, scale, transform))
        return values.get("s", values)

    def mean(self) -> dict[str, Tensor]:
        """The median of each site, which for real sites is the mean."""
        return {name: transform(getattr(self, f"loc_{name}")) for name, transform in self.transforms.items()}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "MeanFieldGuide":
        """The family again, its tensors to be filled."""
        return cls(blora.prior)


class WithHyperparameters(Guide):
    """A guide for s beside a factorized one for the other latents of the prior.

    Args:
        of_s: covers ``"s"``.
        prior: the program; its other sites are covered by a :class:`MeanFieldGuide`.
        scale: initial standard deviation of those.
    """

    family = "with_hyperparameters"
    factorized = True

    def __init__(self, of_s: Guide, prior: Prior, *, scale: float = 0.05) -> None:
        super().__init__()
        self.hyperparameters = MeanFieldGuide(prior, scale=scale, hide=("s",))
        self.of_s = of_s
        self.per_example = of_s.per_example

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the hyperparameters, then s."""
        self.hyperparameters()
        return self.of_s()

    def mean(self) -> dict[str, Tensor]:
        """Medians of the hyperparameters and the mean of s."""
        return {**self.hyperparameters.mean(), **self.of_s.mean()}

    def options(self) -> dict[str, Any]:
        """The family of s and its options."""
        return {"of_s": self.of_s.family, **self.of_s.options()}


def _event_support(fn: Any) -> Any:
    """The support of a single number of the site."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn.support


def _distribution(loc: Tensor, scale: Tensor, transform: Any) -> Any:
    if _is_identity(transform):
        base: Any = dist.Normal(loc, scale)
    elif isinstance(transform, ExpTransform):
        base = dist.LogNormal(loc, scale)
    else:
        base = dist.TransformedDistribution(dist.Normal(loc, scale), [transform])
    return base.to_event(loc.dim())


def _is_identity(transform: Any) -> bool:
    return isinstance(transform, torch.distributions.transforms.ComposeTransform) and not transform.parts
