"""Distributions that a saved posterior may name as its prior, with the shapes that their parameters must have."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from .fixed import FixedPrior, validated

Shape = tuple[int, ...]

#: Families of one number. Each draw takes a bounded time, whatever the parameters are.
UNIVARIATE = (
    *("AffineBeta", "AsymmetricLaplace", "Beta", "Cauchy", "Chi2", "ContinuousBernoulli", "Exponential"),
    *("FisherSnedecor", "Gamma", "GeneralizedPareto", "Gumbel", "HalfCauchy", "HalfNormal", "InverseGamma"),
    *("Kumaraswamy", "Laplace", "LogNormal", "Logistic", "NanMaskedNormal", "Normal", "Pareto", "SkewLogistic"),
    *("SoftAsymmetricLaplace", "SoftLaplace", "Stable", "StableWithLogProb", "StudentT", "Uniform", "VonMises"),
    "Weibull",
)
#: Families of D numbers: which shapes fit D latents.
MULTIVARIATE: dict[str, Callable[[Mapping[str, Shape], int], bool]] = {
    "LowRankMultivariateNormal": lambda shapes, dim: _is_low_rank(shapes, dim),
    "MixtureOfDiagNormals": lambda shapes, dim: _is_mixture(shapes, dim, shapes.get("locs", ())),
    "MixtureOfDiagNormalsSharedCovariance": lambda shapes, dim: _is_mixture(shapes, dim, (dim,)),
    "MultivariateNormal": lambda shapes, dim: shapes == {"loc": (dim,), "scale_tril": (dim, dim)},
    "MultivariateStudentT": lambda shapes, dim: shapes == {"df": (), "loc": (dim,), "scale_tril": (dim, dim)},
    "NanMaskedMultivariateNormal": lambda shapes, dim: shapes == {"loc": (dim,), "scale_tril": (dim, dim)},
    "OMTMultivariateNormal": lambda shapes, dim: shapes == {"loc": (dim,), "scale_tril": (dim, dim)},
}
#: Largest concentration of a von Mises distribution. Its sampler rejects proposals, from 1e20 on all of them.
MAX_CONCENTRATION = 1e10


def known_family(name: object, parameters: Sequence[str]) -> type[Distribution]:
    """Return the class ``name`` of ``pyro.distributions``, which must be a known prior with these parameters.

    Raises:
        ValueError: The class is not one of :data:`UNIVARIATE` and :data:`MULTIVARIATE`, or it has other parameters.
    """
    is_known = isinstance(name, str) and (name in UNIVARIATE or name in MULTIVARIATE)
    family: Any = getattr(dist, cast(str, name)) if is_known else None
    allowed = getattr(family, "arg_constraints", None) if is_known else {}
    if is_known and not isinstance(allowed, dict):  # a property, as of Uniform, whose constraints depend on its values
        allowed = set(inspect.signature(family).parameters) - {"validate_args"}
    if not allowed or not parameters or not set(parameters) <= set(allowed):
        known = ", ".join(sorted((*UNIVARIATE, *MULTIVARIATE)))
        raise ValueError(
            f"{name!r} with parameters {list(parameters)} is not a known prior: see pyro.distributions. Allowed in "
            f"files: {known}. Pass from_pretrained(..., prior=...) for another one."
        )
    return cast(type[Distribution], family)


def from_parameters(family: type[Distribution], parameters: dict[str, Tensor], dim: int) -> FixedPrior:
    """Rebuild a saved prior; check its parameters against the family and the D latents.

    The shapes are checked first: parameters of other shapes could broadcast to any size.

    Raises:
        ValueError: Parameters violate the family's constraints, or do not fit D latents.
    """
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    fits = MULTIVARIATE.get(family.__name__)
    if not (fits(shapes, dim) if fits else all(shape in ((), (1,), (dim,)) for shape in shapes.values())):
        raise ValueError(f"its parameters have the shapes {shapes}, which do not fit {dim} latents.")
    concentration = parameters.get("concentration")
    if family.__name__ == "VonMises" and concentration is not None and (concentration > MAX_CONCENTRATION).any():
        raise ValueError(f"concentration={concentration.max().item():g} must be at most {MAX_CONCENTRATION:g}.")
    d = validated(family, parameters)
    if tuple(d.batch_shape + d.event_shape) != (dim,):
        raise ValueError(f"its shape is {tuple(d.batch_shape + d.event_shape)}, expected ({dim},).")
    return FixedPrior(family, parameters)


def _is_low_rank(shapes: Mapping[str, Shape], dim: int) -> bool:
    """Tell whether these are the parameters of a low rank, which is at most D."""
    factor = shapes.get("cov_factor", ())
    rank = factor[1] if len(factor) == 2 else 0
    return 1 <= rank <= dim and shapes == {"loc": (dim,), "cov_factor": (dim, rank), "cov_diag": (dim,)}


def _is_mixture(shapes: Mapping[str, Shape], dim: int, scale: Shape) -> bool:
    """Tell whether these are the parameters of a mixture of K normals."""
    count = shapes.get("component_logits", ())
    return len(count) == 1 and shapes == {
        "locs": (*count, dim),
        "coord_scale": scale,
        "component_logits": count,
    }
