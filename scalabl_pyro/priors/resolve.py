"""From ``prior=`` of :func:`scalabl_pyro.bayesian_lora` to a prior, and from a prior to its saved options and back."""

import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from .._arguments import known_arguments
from .._errors import check_choice, check_scale
from ..lora.subspace import Layer, Subspace
from .base import Prior
from .empirical_bayes import EmpiricalBayesPrior
from .fixed import FixedPrior, from_distribution, from_layers
from .hierarchical import HierarchicalPrior
from .horseshoe import HorseshoePrior
from .rank_mask import RankMaskPrior
from .saved_distribution import from_parameters, known_family

#: Names of priors for ``bayesian_lora(prior=...)``.
PriorName = Literal[
    "normal", "laplace", "student_t", "lognormal", "empirical", "hierarchical", "horseshoe", "rank_mask"
]
#: All that ``bayesian_lora(prior=...)`` accepts.
PriorLike = float | PriorName | Distribution | Prior | Callable[[Layer], Distribution]

#: Families with latents or parameters of their own.
FAMILIES: dict[str, type[Prior]] = {
    "empirical": EmpiricalBayesPrior,
    "hierarchical": HierarchicalPrior,
    "horseshoe": HorseshoePrior,
    "rank_mask": RankMaskPrior,
}
#: Fixed distributions by name. The log-normal keeps s positive, as singular values are. Its median, 0.58, is where s
#: starts in a wide layer; the initial singular values of a layer that is not much wider than r spread around it.
DISTRIBUTIONS: dict[str, Callable[[], Distribution]] = {
    "normal": lambda: dist.Normal(0.0, 1.0),
    "laplace": lambda: dist.Laplace(0.0, 0.5**0.5),  # variance 1
    "student_t": lambda: dist.StudentT(4.0, 0.0, 0.5**0.5),  # variance 1
    "lognormal": lambda: dist.LogNormal(-0.55, 0.5),
}


@known_arguments
def as_prior(prior: PriorLike, subspace: Subspace) -> Prior:
    """Build the Pyro program of a prior.

    Args:
        prior: One of these:

            - A number: the scale (standard deviation) of Normal(0, scale).
            - A name: ``"normal"``, ``"laplace"``, ``"student_t"``, ``"lognormal"``, ``"horseshoe"``,
              ``"hierarchical"``, ``"empirical"`` or ``"rank_mask"``.
            - A Pyro distribution with batch shape () or (D,), or event shape (D,).
            - A callable ``layer -> distribution`` of batch shape () or (r,), with one family for all layers.
            - A :class:`Prior`.
        subspace: The D latents and their layers.

    Returns:
        The prior, with its latents set up.

    Raises:
        TypeError: ``prior`` is none of these.
        ValueError: The name is unknown, the scale is not positive, or shapes do not fit the latents.

    Example:
        >>> scalabl_pyro.priors.as_prior("laplace", blora.subspace)
        FixedPrior(Laplace(loc, scale))
    """
    if isinstance(prior, str):
        check_choice("prior", prior, get_args(PriorName))
        prior = FAMILIES[prior]() if prior in FAMILIES else DISTRIBUTIONS[prior]()
    if isinstance(prior, Prior):
        return _set_up(prior, subspace)
    if isinstance(prior, type):
        raise TypeError(_not_a_prior(prior))
    if isinstance(prior, numbers.Real) and not isinstance(prior, bool):
        if not 0 < prior < float("inf"):
            raise ValueError(f"prior={prior}: a scale (standard deviation) must be positive and finite.")
        check_scale(prior=float(prior))
        scale = torch.tensor(float(prior), dtype=torch.float64)
        prior = dist.Normal(torch.zeros_like(scale), scale)
    if isinstance(prior, Distribution):
        return _set_up(from_distribution(prior, subspace.dim), subspace)
    if callable(prior):
        return _set_up(from_layers(prior, subspace), subspace)
    raise TypeError(_not_a_prior(prior))


def to_config(prior: Prior) -> dict[str, Any]:
    """Return what to save of a prior besides its tensors: family, class, names of parameters and options."""
    if type(prior) is FixedPrior:
        family, parameters = prior.family_name, list(prior.parameter_names)
    else:
        family = (prior.family or "") if type(prior) is FAMILIES.get(prior.family or "") else ""
        parameters = []
    return {
        "family": family or None,
        "class": type(prior).__name__,
        "parameters": parameters,
        "options": prior.options(),
    }


def from_saved(entry: Mapping[str, Any], tensors: Mapping[str, Tensor], subspace: Subspace) -> Prior:
    """Rebuild a saved prior.

    Args:
        entry: What :func:`to_config` returned.
        tensors: Parameters of a fixed distribution by name. Tensors of a family in ``FAMILIES`` are filled by the
            caller afterwards.
        subspace: The D latents and their layers.

    Raises:
        ValueError: The family is unknown, it does not accept the options, or parameters violate its constraints.
    """
    if entry["family"] in FAMILIES:
        return _set_up(FAMILIES[entry["family"]](**entry["options"]), subspace)
    names = [str(name) for name in entry["parameters"]]
    family = known_family(entry["family"], names)
    if set(names) != set(tensors):
        raise ValueError(
            f"missing {sorted(set(names) - set(tensors))}, unexpected {sorted(set(tensors) - set(names))}."
        )
    return _set_up(from_parameters(family, {name: tensors[name] for name in names}, subspace.dim), subspace)


def _set_up(prior: Prior, subspace: Subspace) -> Prior:
    """Tell the prior its latents, once; refuse another model's latents afterwards."""
    if type(prior).setup is Prior.setup:
        return prior  # it does not depend on the latents
    known = prior.__dict__.get("subspace")
    if known is None:
        prior.__dict__["subspace"] = subspace
        prior.setup(subspace)
    elif known != subspace:
        raise ValueError(
            f"This {type(prior).__name__} belongs to a model with {known.dim} latents: make a new one for this model."
        )
    return prior


def _not_a_prior(prior: object) -> str:
    return (
        f"prior={prior!r}: expected a scale, a name such as 'horseshoe', a Pyro distribution such as "
        "dist.Normal(0., 1.), a callable layer -> distribution, or a scalabl_pyro.priors.Prior."
    )
