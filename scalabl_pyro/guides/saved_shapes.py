"""Names and shapes of the tensors of a saved guide, computed from its options before anything is built.

The options of a guide in a file may ask for any rank, width, depth or number of points. The loader compares these names
and shapes with those of the file's tensors. So a guide is built only if the file holds all its numbers.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor

from .._errors import check_choice
from .._values import shown
from ..priors import Prior
from ..priors.sites import prior_sites
from ..priors.supports import base_support, to_support
from ..storage.budget import Budget
from ..storage.tensor_files import check_keys
from .auto import check_saved_options
from .covariance import LowRankGuide
from .flow import FlowGuide

Shapes = dict[str, tuple[int, ...]]

#: Stands for all names that begin with what is before it, with any shapes.
ANY = "*"
#: AutoGuides with known shapes. ``AutoGaussian`` has no options, so the prior alone determines its size.
AUTO_CLASSES = (
    "AutoDelta",
    "AutoDiagonalNormal",
    "AutoGaussian",
    "AutoIAFNormal",
    "AutoLowRankMultivariateNormal",
    "AutoMultivariateNormal",
    "AutoNormal",
)
#: Levels of guides in guides: a mixture of guides with hyperparameters has three.
MAX_NESTING = 4


def saved_shapes(
    family: str, options: Mapping[str, Any], prior: Prior, ranks: list[int], *, budget: Budget, file: str
) -> Shapes:
    """Compute names and shapes of the tensors that a guide of a family has.

    Args:
        family: Name of the family, one of ``FAMILIES``.
        options: Saved options of the family.
        prior: Prior whose sites the guide covers.
        ranks: Rank of each layer; they sum to D.
        budget: Budget that components, layers of networks, and the matrices of a draw are drawn from.
        file: File of the options, for messages.

    Returns:
        Shape of each tensor by name. A name that ends with :data:`ANY` stands for tensors whose names and number do not
        depend on options.

    Raises:
        ValueError: An option has a value that no guide has, or the guide exceeds the budget.
    """
    return _Computation(prior, ranks, budget, file).of(family, options)


def check_saved_shapes(what: str, saved: Mapping[str, Tensor], expected: Shapes) -> None:
    """Raise ValueError unless saved tensors have exactly the expected names and shapes."""
    open_ended = tuple(name.removesuffix(ANY) for name in expected if name.endswith(ANY))
    closed = {name: shape for name, shape in expected.items() if not name.endswith(ANY)}
    found = {name: value for name, value in saved.items() if not (open_ended and name.startswith(open_ended))}
    check_keys(what, set(found), set(closed))
    for name, shape in closed.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{what}: {name!r} is {tuple(found[name].shape)}, expected {shape}.")


class _Computation:
    """The computation of :func:`saved_shapes`, with what its parts share."""

    def __init__(self, prior: Prior, ranks: list[int], budget: Budget, file: str) -> None:
        self.prior, self.ranks, self.budget, self.file = prior, ranks, budget, file
        self.dim = sum(ranks)

    @cached_property
    def sites(self) -> Shapes:
        """Shape of each latent site of the prior on the real line."""
        sites = prior_sites(self.prior)
        return {name: _free_shape(site["fn"], site["median"]) for name, site in sites.items()}

    def of(self, family: object, options: Mapping[str, Any], level: int = 0) -> Shapes:
        """Shapes of a guide that has ``level`` guides around it."""
        if level >= MAX_NESTING:
            raise ValueError(f"guides are nested deeper than {MAX_NESTING} levels.")
        if not isinstance(family, str):
            raise ValueError(f"the family {shown(family)} must be the name of a guide.")
        if level:
            self.budget.spend("members", 1, self.file)
        if family == "with_hyperparameters":
            of_s = self.of(options.get("of_s"), {k: v for k, v in options.items() if k != "of_s"}, level + 1)
            others = {name: shape for name, shape in self.sites.items() if name != "s"}
            return _under("hyperparameters", _mean_field(others)) | _under("of_s", of_s)
        if family == "mixture":
            return self.mixture(options.get("components"), level)
        by_family: dict[str, Callable[[], Shapes]] = {
            "auto": lambda: self.auto(options),
            "covariance": lambda: self.covariance(options),
            "delta": lambda: {"loc": (self.dim,)},
            "empirical": lambda: _empirical(options),
            "flow": lambda: self.flow(options),
            "lowrank": lambda: self.lowrank(options),
            "mean_field": lambda: _mean_field(self.sites),
            "normal": lambda: _normal(self.dim),
            "rank_mask": lambda: {"logits": (self.dim,)},
        }
        return by_family[family]() if family in by_family else {ANY: ()}  # from_options refuses an unknown family

    def mixture(self, components: object, level: int) -> Shapes:
        if not isinstance(components, list) or not all(map(_is_component, components)):
            raise ValueError(f"components={shown(components)} must be a list of [family, options].")
        found: Shapes = {}
        for i, (name, options) in enumerate(components):
            found |= _under(f"components.{i}", self.of(name, options, level + 1))
        return found

    def covariance(self, options: Mapping[str, Any]) -> Shapes:
        structure = options.get("structure")
        check_choice("structure", structure, ("layer", "full"))
        self.budget.spend("numbers", 2 * self.dim**2, self.file)  # a draw builds the whole factor
        blocks = self.ranks if structure == "layer" else [self.dim]
        return _normal(self.dim) | {"lower": (sum(r * (r - 1) // 2 for r in blocks),)}

    def lowrank(self, options: Mapping[str, Any]) -> Shapes:
        rank = _whole("rank", options.get("rank", _default(LowRankGuide, "rank")), 1, self.dim)
        return _normal(self.dim) | {"factor": (self.dim, rank)}

    def flow(self, options: Mapping[str, Any]) -> Shapes:
        dim, count = self.dim, options.get("num_transforms", _default(FlowGuide, "num_transforms"))
        count, hidden = _whole("num_transforms", count, 1, None), options.get("hidden")
        hidden = _whole("hidden", dim + 1 if hidden is None else hidden, dim + 1, 10 * dim + 10)
        self.budget.spend("layers", 2 * count, self.file)
        shapes = _normal(dim)
        for i in range(count):
            shapes |= _under(f"networks.{i}", _network(dim, [hidden]))
        return shapes

    def auto(self, options: Mapping[str, Any]) -> Shapes:
        """Shapes of Pyro's AutoGuides over all latents together."""
        name, dim = options.get("class"), sum(math.prod(shape) for shape in self.sites.values())
        check_saved_options(options, self.dim)
        if not isinstance(name, str) or name not in AUTO_CLASSES:
            return {ANY: ()}  # AutoFamily refuses it
        if name in ("AutoGaussian", "AutoMultivariateNormal"):
            self.budget.spend("numbers", 2 * dim**2, self.file)
        free = {f"{site}_unconstrained": shape for site, shape in self.sites.items()}
        shapes = _normal(dim)
        if name == "AutoMultivariateNormal":
            shapes["scale_tril_unconstrained"] = (dim, dim)
        elif name == "AutoLowRankMultivariateNormal":
            rank = options.get("rank")
            shapes["cov_factor"] = (dim, round(dim**0.5) if rank is None else _whole("rank", rank, 1, 10 * dim))
        elif name == "AutoNormal":
            shapes = _under("locs", free) | _under("scales", free)
        elif name == "AutoDelta":
            shapes = free
        elif name == "AutoGaussian":
            shapes = {ANY: ()}
        elif name == "AutoIAFNormal":
            shapes = self.iaf(options, dim)
        return _under("auto", shapes)

    def iaf(self, options: Mapping[str, Any], dim: int) -> Shapes:
        count, hidden = _whole("num_transforms", options.get("num_transforms", 1), 1, None), options.get("hidden_dim")
        hidden = [3 * dim + 1] if hidden is None else hidden
        if not isinstance(hidden, list) or not hidden:
            raise ValueError(f"hidden_dim={shown(hidden)} must be a list of one or more widths.")
        hidden = [_whole("hidden_dim", width, dim, 10 * dim + 10) for width in hidden]
        self.budget.spend("layers", count * (len(hidden) + 1), self.file)
        shapes: Shapes = {"_prototype_tensor": (hidden[0], dim)}
        for i in range(count):
            shapes |= _under(f"transform.{i}.arn", _network(dim, hidden))
        return shapes


def _normal(dim: int) -> Shapes:
    return {"loc": (dim,), "scale_unconstrained": (dim,)}


def _mean_field(sites: Shapes) -> Shapes:
    locs = {f"loc_{name}": shape for name, shape in sites.items()}
    return locs | {f"scale_{name}_unconstrained": shape for name, shape in sites.items()}


def _network(dim: int, hidden: list[int]) -> Shapes:
    """An autoregressive network of Pyro with a shift and a log scale per latent."""
    shapes: Shapes = {"permutation": (dim,)}
    widths = [dim, *hidden, 2 * dim]
    for i, (before, after) in enumerate(pairwise(widths)):
        layer: Shapes = {"weight": (after, before), "bias": (after,), "mask": (after, before)}
        shapes |= _under(f"layers.{i}", layer)
    return shapes


def _empirical(options: Mapping[str, Any]) -> Shapes:
    shapes, statistics = options.get("shapes"), options.get("statistics", [])
    if not isinstance(shapes, dict) or "s" not in shapes or not all(map(_is_shape, shapes.values())):
        raise ValueError(
            f"shapes={shown(shapes)} must map each site, also 's', to its shape: a list of positive whole numbers."
        )
    if not isinstance(statistics, list) or not all(isinstance(n, str) and n.isidentifier() for n in statistics):
        raise ValueError(f"statistics={shown(statistics)} must be a list of names.")
    if len(set(statistics)) < len(statistics):
        raise ValueError(f"statistics={shown(statistics)} has a name twice.")
    points = {f"points_{name}": tuple(shape) for name, shape in shapes.items()}
    return points | {f"statistic_{name}": (shapes["s"][0],) for name in statistics}


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)


def _free_shape(fn: Any, value: Any) -> tuple[int, ...]:
    if fn.support.is_discrete or base_support(fn).event_dim == 0:
        return tuple(value.shape)
    return tuple(to_support(fn).inv(value).shape)


def _whole(name: str, value: object, least: int, most: int | None) -> int:
    in_range = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not in_range or (most is not None and value > most):  # type: ignore[operator]
        limit = f"from {least} on" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={shown(value)} must be a whole number {limit}.")
    return int(value)  # type: ignore[call-overload]


def _is_shape(shape: object) -> bool:
    is_list = isinstance(shape, list) and 1 <= len(shape) <= 8
    return is_list and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape)  # type: ignore[attr-defined]


def _default(guide: type, option: str) -> Any:
    return inspect.signature(guide).parameters[option].default


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
