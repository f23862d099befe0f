"""Fixed priors: one Pyro distribution for all latents, or one per layer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal

from ..lora.subspace import Layer, Subspace
from .base import Prior
from .supports import describe_support, is_joint


class FixedPrior(Prior):
    """A distribution of s whose parameters are constants.

    Args:
        family: Class of ``pyro.distributions``.
        parameters: Its constructor arguments, with batch shape (D,) and no event dimensions, or event shape (D,).

    Example:
        >>> import torch
        >>> from pyro import distributions as dist
        >>> prior = scalabl_pyro.priors.FixedPrior(dist.Normal, {"loc": torch.zeros(3), "scale": torch.ones(3)})
        >>> prior
        FixedPrior(Normal(loc, scale))
    """

    def __init__(self, family: type[Distribution], parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.distribution_class = family
        self.parameter_names = tuple(parameters)
        for name, value in parameters.items():
            # A file gives contiguous tensors back. torch's Cholesky factor is not, and sums in another order.
            self.register_buffer(name, value.contiguous())

    @property
    def family_name(self) -> str:
        """Name of the class in ``pyro.distributions``."""
        return self.distribution_class.__name__

    def distribution(self) -> Any:
        """Give the distribution of s, with event shape (D,).

        It is built once for the same parameters: many constructors of torch bring a number from the host to the device,
        which a CUDA graph cannot hold.
        """
        parameters = {name: getattr(self, name) for name in self.parameter_names}
        state = [(value, None if value.is_inference() else value._version) for value in parameters.values()]
        known, built = self.__dict__.get("_built", ([], None))
        if built is None or not _is_unchanged(known, state):
            base: Any = self.distribution_class(**parameters)
            built = base if base.event_shape else base.to_event(1)
            self.__dict__["_built"] = (state, built)
        return built

    def __getstate__(self) -> dict[str, Any]:
        """Leave the built distribution out of copies."""
        return {name: value for name, value in super().__getstate__().items() if name != "_built"}

    def forward(self) -> Tensor:
        """Sample s, (..., D)."""
        return pyro.sample("s", self.distribution())

    def extra_repr(self) -> str:
        """Return family and parameter names."""
        return f"{self.family_name}({', '.join(self.parameter_names)})"


def _is_unchanged(before: list[tuple[Tensor, int | None]], now: list[tuple[Tensor, int | None]]) -> bool:
    """Whether these are the same tensors, and nobody has written into them."""
    return all(
        old is new and version is not None and version == count
        for (old, version), (new, count) in zip(before, now, strict=True)
    )


def from_distribution(prior: Distribution, dim: int) -> FixedPrior:
    """Build the prior of s from a Pyro distribution.

    Args:
        prior: Distribution with batch shape () or (D,), or with event shape (D,).
        dim: Number D of latents.

    Raises:
        ValueError: The shape is another, or the distribution is discrete or cannot be rebuilt from its parameters.
    """
    family, parameters = _decompose(prior)
    return FixedPrior(family, {name: _spread(prior, value, dim) for name, value in parameters.items()})


def from_layers(prior: Callable[[Layer], Distribution], subspace: Subspace) -> FixedPrior:
    """Build the prior of s from one distribution per layer.

    Args:
        prior: Function from layer to a distribution with batch shape () or (r,).
        subspace: The D latents and their layers.

    Raises:
        TypeError: The function does not take one argument, or returns something else than a distribution.
        ValueError: Layers have different families, or a family is multivariate.
    """
    parts: list[tuple[type, dict[str, Tensor]]] = []
    bases: list[Distribution] = []
    try:
        inspect.signature(prior).bind(subspace.layers[0])
    except TypeError:
        raise TypeError(
            f"prior={prior!r} does not take one argument. A callable prior gets each layer and returns its "
            "distribution, as in lambda layer: dist.Normal(0.0, 1.0). Pass a distribution itself without a function."
        ) from None
    except ValueError:  # a built-in function without a signature
        pass
    for layer in subspace:
        d = prior(layer)
        if not isinstance(d, Distribution):
            raise TypeError(
                f"prior({layer.name!r}) returned {type(d).__name__}, not a Pyro distribution. Return one, such as "
                "dist.Normal(0.0, 1.0)."
            )
        family, parameters = _decompose(d)
        bases.append(_base(d))
        parts.append((family, {k: _spread(d, v, layer.rank) for k, v in parameters.items()}))
    families = {family for family, _ in parts}
    if len(families) > 1 or any(d.event_shape for d in bases):
        names = sorted(f.__name__ for f in families)
        raise ValueError(
            f"A prior per layer must use one univariate family for all layers, got {names}. "
            "Write a scalabl_pyro.priors.Prior to mix families."
        )
    return FixedPrior(parts[0][0], {k: torch.cat([p[k] for _, p in parts]) for k in parts[0][1]})


def _decompose(d: Distribution) -> tuple[type, dict[str, Tensor]]:
    """Return class and constructor arguments of a distribution, which can be moved between devices and saved."""
    d = _base(d)
    _check_possible(d)
    family = getattr(dist, type(d).__name__, None)
    if isinstance(d, MultivariateNormal):
        names = ["loc", "scale_tril"]
    else:
        names = [name for name in d.arg_constraints if name != "logits" or "probs" not in d.arg_constraints]
    parameters = {name: torch.as_tensor(getattr(d, name)) for name in names} if family is not None else {}
    if family is None or not _rebuilds(family, parameters):
        raise ValueError(
            f"A {type(d).__name__} cannot be rebuilt from its parameters, so it cannot be saved. Write a subclass of "
            "scalabl_pyro.priors.Prior whose forward() samples it. The page 'Own prior' shows one for mixtures "
            "and transformed distributions."
        )
    _check_parameters(family, parameters)
    return family, parameters


def _check_parameters(family: type, parameters: dict[str, Tensor]) -> None:
    """Check that the parameters of a prior are finite in float32, and allowed by its family.

    Raises:
        ValueError: They are not. A distribution with ``validate_args=False`` did not say so itself.
    """
    for name, value in parameters.items():
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"prior: the parameter {name!r} of {family.__name__} must be finite in float32.")
    try:
        build: Any = family
        checked = (
            "validate_args" in inspect.signature(build).parameters
        )  # mixtures of normals check without being asked
        build(**parameters, **({"validate_args": True} if checked else {}))
    except ValueError as error:
        raise ValueError(f"prior: {family.__name__} does not allow these parameters: {error}") from None


def validated(family: type[Distribution], parameters: Mapping[str, Tensor]) -> Distribution:
    """Build a distribution that checks its parameters.

    Raises:
        ValueError: The parameters violate the family's constraints.
    """
    build: Any = family
    checked = "validate_args" in inspect.signature(build).parameters  # mixtures of normals check without being asked
    return build(**parameters, **({"validate_args": True} if checked else {}))


def _check_possible(d: Distribution) -> None:
    """Check that a distribution can be a prior of latents that move freely.

    Raises:
        ValueError: It is discrete, a point, or constrains the latents jointly.
    """
    name = type(d).__name__
    if isinstance(d, dist.Delta):
        raise ValueError(
            "A Delta fixes s, so that nothing about s can be learned. Use scalabl_pyro.baselines.mle for plain LoRA "
            "with a fixed s, or a narrow prior such as dist.Normal(1.0, 0.01)."
        )
    if getattr(d.support, "is_discrete", False):
        raise ValueError(
            f"A {name} is discrete, but s is real. Use a continuous distribution such as dist.Normal(0.0, 1.0), or "
            "prior='rank_mask' to switch ranks on and off."
        )
    if is_joint(d):
        raise ValueError(
            f"A {name} constrains its numbers jointly ({describe_support(d)}), but each latent must move alone. Use a "
            "univariate family such as dist.Gamma(2.0, 2.0) or dist.Beta(2.0, 2.0), or a multivariate normal."
        )


def _rebuilds(family: type, parameters: dict[str, Tensor]) -> bool:
    """Tell whether a distribution can be built from these parameters."""
    if not parameters:
        return False
    try:
        family(**parameters)
    except (TypeError, ValueError):
        return False
    return True


def _base(d: Distribution) -> Distribution:
    while isinstance(d, Independent):
        d = d.base_dist
    return d


def _spread(d: Distribution, value: Tensor, dim: int) -> Tensor:
    """Expand one parameter of a scalar distribution to ``dim`` latents."""
    if d.event_shape:
        if d.event_shape != (dim,) or d.batch_shape:
            raise ValueError(
                f"The prior has batch shape {tuple(d.batch_shape)} and event shape {tuple(d.event_shape)}, but there "
                f"are {dim} latents: use a scalar distribution, or one with shape ({dim},)."
            )
        return value.detach().clone()
    try:
        return value.detach().expand(dim).clone()
    except RuntimeError:
        raise ValueError(
            f"The prior has batch shape {tuple(d.batch_shape)}, but there are {dim} latents: use a scalar "
            f"distribution, or one with shape ({dim},)."
        ) from None
