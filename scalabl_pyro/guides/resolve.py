"""From ``guide=`` of :func:`scalabl_pyro.fit` to a guide, and from a guide to its saved options and back."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args

import torch
from pyro.infer import autoguide
from torch import Tensor, nn
from torch.distributions import Distribution

from .._arguments import check_role, known_arguments
from .._errors import check_choice
from ..model.bayesian_lora import BayesianLoRA
from ..priors.sites import check_continuous, prior_sites
from ..priors.supports import describe_support, is_real
from .auto import AutoFamily, AutoInstance, check_not_messenger
from .base import Guide
from .covariance import CovarianceGuide, LowRankGuide
from .delta import DeltaGuide
from .empirical import EmpiricalGuide
from .flow import FlowGuide
from .initial_scale import INIT_SCALE, draw_initial_scale
from .mean_field import MeanFieldGuide, WithHyperparameters
from .mixture import MixtureGuide
from .normal import NormalGuide
from .particles import ParticleGuide
from .rank_mask import RankMaskGuide

#: Names of guides for ``fit(guide=...)``.
GuideName = Literal["normal", "layer_covariance", "full_covariance", "lowrank", "flow", "delta", "rank_mask", "svgd"]
#: All that ``fit(guide=...)`` accepts.
GuideLike = GuideName | type[autoguide.AutoGuide] | autoguide.AutoGuide | Guide | Callable[[BayesianLoRA], Guide]

NAMES: tuple[str, ...] = get_args(GuideName)
#: Families that a saved posterior can name.
FAMILIES: dict[str, type[Guide]] = {
    guide.family: guide
    for guide in (
        AutoFamily,
        CovarianceGuide,
        DeltaGuide,
        EmpiricalGuide,
        FlowGuide,
        LowRankGuide,
        MeanFieldGuide,
        MixtureGuide,
        NormalGuide,
        RankMaskGuide,
        WithHyperparameters,
    )
    if guide.family is not None
}
#: AutoGuides that carry a family like the named one to the support of the prior.
FOR_ANY_SUPPORT = {
    "layer_covariance": "AutoMultivariateNormal",
    "full_covariance": "AutoMultivariateNormal",
    "lowrank": "AutoLowRankMultivariateNormal",
    "flow": "AutoIAFNormal",
}
#: Largest rank of the guide ``"lowrank"``; with fewer latents, their number.
DEFAULT_RANK = 10


@known_arguments
def as_guide(guide: GuideLike, blora: BayesianLoRA, *, init_scale: float = INIT_SCALE, seed: int = 0) -> Guide:
    """Build the guide that ``guide`` names, with the initial values of the paper.

    Args:
        guide: One of these:

            - A name: ``"normal"`` (factorized, transformed to the support of the prior), ``"layer_covariance"`` (a full
              covariance within each layer), ``"full_covariance"``, ``"lowrank"``, ``"flow"``, ``"delta"`` (MAP),
              ``"svgd"`` (particles) or ``"rank_mask"``. If the prior has latents besides s, a factorized guide covers
              those.
            - A class of ``pyro.infer.autoguide``, or an instance that was built on ``blora.prior``.
            - A :class:`Guide`, which is returned as it is.
            - A callable ``blora -> Guide``.
        blora: Adapted LLM whose latents the guide describes.
        init_scale: Largest initial standard deviation; scales start uniform on (init_scale / sqrt(2), init_scale).
        seed: Seed of the initial scales.

    Returns:
        The guide, on the device of ``blora`` where it was built here.

    Raises:
        ValueError: The name is unknown, the family cannot have the support of the prior, or Pyro's class needs more
            than the prior.
        TypeError: ``guide`` is none of these.

    Example:
        >>> guide = scalabl_pyro.guides.as_guide("lowrank", blora, init_scale=0.1)
        >>> guide.family
        'lowrank'
    """
    check_role("blora", blora, "blora", call="as_guide(guide, blora)")
    if isinstance(guide, str):
        check_choice("guide", guide, NAMES)
        return _build_named(guide, blora, init_scale, seed)
    check_not_messenger(guide)
    if isinstance(guide, type) and issubclass(guide, autoguide.AutoGuide):
        takes_scale = "init_scale" in inspect.signature(guide).parameters
        options: dict[str, Any] = {"init_scale": init_scale} if takes_scale else {}
        return AutoFamily(blora.prior, guide, init_loc_fn=blora.init_loc, **options).to(blora.device)
    built: Any = wrap_autoguide(cast(Any, guide)(blora) if _is_builder(guide) else guide)
    check_not_messenger(built)
    if not isinstance(built, Guide):
        raise TypeError(
            f"guide={guide!r}: expected a name ({', '.join(map(repr, NAMES))}), a class of pyro.infer.autoguide, an "
            "AutoGuide instance that was built on blora.prior, an instance of scalabl_pyro.guides.Guide, or a function "
            "that takes blora and returns a Guide."
        )
    return built


def wrap_autoguide(guide: object) -> object:
    """Wrap an AutoGuide of Pyro as a :class:`Guide`; return anything else as it is."""
    return AutoInstance(guide) if isinstance(guide, autoguide.AutoGuide) else guide


def to_config(guide: Guide) -> dict[str, Any]:
    """Return what to save of a guide besides its tensors: family, class and options."""
    built_in = type(guide) is FAMILIES.get(guide.family or "")
    return {"family": guide.family if built_in else None, "class": type(guide).__name__, "options": guide.options()}


def from_options(family: str, options: dict[str, Any], blora: BayesianLoRA) -> Guide:
    """Rebuild a saved guide; the caller fills its tensors.

    Args:
        family: Saved name of the family, see ``FAMILIES``.
        options: Saved options of the family.
        blora: Adapted LLM whose latents the guide describes.

    Raises:
        ValueError: The family is unknown, or it does not accept the options.
    """
    check_choice("family", family, FAMILIES)
    if family == WithHyperparameters.family:
        rest = {k: v for k, v in options.items() if k != "of_s"}
        return WithHyperparameters(from_options(str(options.get("of_s")), rest, blora), blora.prior)
    if family == MixtureGuide.family:
        components = options.get("components")
        if not isinstance(components, list) or not all(isinstance(c, list) and len(c) == 2 for c in components):
            raise ValueError(f"components={components!r} must be a list of [family, options].")
        return MixtureGuide([from_options(str(name), dict(rest), blora) for name, rest in components])
    return FAMILIES[family].from_options(options, blora)


def _is_builder(guide: object) -> bool:
    """Whether ``guide`` is a callable that takes the LLM, and neither a module nor a built-in family."""
    if not callable(guide) or isinstance(guide, nn.Module) or guide in FAMILIES.values():
        return False
    try:
        inspect.signature(guide).bind("blora")
    except (TypeError, ValueError):  # another number of arguments, or a built-in without a signature
        return False
    return True


def _build_named(name: GuideName, blora: BayesianLoRA, init_scale: float, seed: int) -> Guide:
    """Build a guide by name, for the support of s under the prior and for its other latents."""
    sites = prior_sites(blora.prior)
    fn = sites["s"]["fn"] if "s" in sites else None
    loc = blora.adapter.loc.to(blora.device)
    scale = draw_initial_scale(loc, init_scale, seed=seed)
    if fn is not None and fn.support.is_discrete:
        if name not in ("normal", "rank_mask"):
            check_continuous(f"guide={name!r}", sites)
        return RankMaskGuide(torch.logit(fn.mean.to(loc)))
    if name == "rank_mask":
        raise ValueError("guide='rank_mask' is for masks: use it with prior='rank_mask'.")
    real = fn is None or is_real(fn)
    if name == "delta":  # AutoDelta moves a point within the support of its site
        return DeltaGuide(loc) if real and set(sites) == {"s"} else as_guide(autoguide.AutoDelta, blora)
    if not real:
        return _build_bounded(name, cast(Distribution, fn), blora, init_scale)
    if name == "svgd" and set(sites) != {"s"}:
        raise ValueError("guide='svgd' moves particles of s alone; this prior has other latents too: use 'normal'.")
    of_s = _build_real(name, loc, scale, blora.subspace.ranks, seed)
    return of_s if set(sites) <= {"s"} else WithHyperparameters(of_s, blora.prior, scale=init_scale)


def _build_bounded(name: GuideName, fn: Distribution, blora: BayesianLoRA, init_scale: float) -> Guide:
    """Build the only guide by name for latents that are not on the whole real line."""
    if name != "normal":
        other = FOR_ANY_SUPPORT.get(name)
        advice = f", or the class pyro.infer.autoguide.{other}" if other else ""
        raise ValueError(
            f"guide={name!r} needs latents on the real line; this prior's are {describe_support(fn)}: use "
            f"'normal'{advice}, which stays in the support."
        )
    return MeanFieldGuide(blora.prior, start={"s": blora.adapter.loc.to(blora.device)}, scale=init_scale)


def _build_real(name: GuideName, loc: Tensor, scale: Tensor, ranks: list[int], seed: int) -> Guide:
    """Build a guide for s on the real line."""
    builders: Mapping[str, Callable[[], Guide]] = {
        "normal": lambda: NormalGuide(loc, scale),
        "layer_covariance": lambda: CovarianceGuide(loc, scale, ranks=ranks),
        "full_covariance": lambda: CovarianceGuide(loc, scale),
        "lowrank": lambda: LowRankGuide(loc, scale, rank=min(DEFAULT_RANK, len(loc)), seed=seed),
        "flow": lambda: FlowGuide(loc, scale),
        "svgd": lambda: ParticleGuide(loc, scale, seed=seed),
    }
    return builders[name]()
