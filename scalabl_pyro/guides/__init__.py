"""Posterior families, one file each: ``guide=`` of :func:`scalabl_pyro.fit` is resolved here."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.infer import autoguide

from .._errors import check_choice
from ..model.bayesian_lora import BayesianLoRA
from ..priors.sites import check_continuous, prior_sites
from .auto import AutoFamily, AutoInstance
from .base import Guide
from .covariance import CovarianceGuide, LowRankGuide
from .delta import DeltaGuide
from .empirical import EmpiricalGuide
from .flow import FlowGuide
from .mean_field import MeanFieldGuide, WithHyperparameters
from .mixture import MixtureGuide
from .normal import NormalGuide
from .particles import ParticleGuide
from .rank_mask import RankMaskGuide

__all__ = [
    "AutoFamily",
    "AutoInstance",
    "CovarianceGuide",
    "DeltaGuide",
    "EmpiricalGuide",
    "FlowGuide",
    "Guide",
    "LowRankGuide",
    "MeanFieldGuide",
    "MixtureGuide",
    "NormalGuide",
    "ParticleGuide",
    "RankMaskGuide",
    "WithHyperparameters",
    "as_guide",
]

GuideLike = str | type[autoguide.AutoGuide] | autoguide.AutoGuide | Guide | Callable[[BayesianLoRA], Guide]

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
#: Families for a real-valued s, by the word that names them in ``fit(guide=...)``.
OF_S: dict[str, Callable[..., Guide]] = {
    "normal": NormalGuide,
    "layer_covariance": CovarianceGuide,
    "full_covariance": CovarianceGuide,
    "lowrank": LowRankGuide,
    "flow": FlowGuide,
}
NAMES = (*OF_S, "delta", "rank_mask", "svgd")
#: Largest initial standard deviation. The paper starts at 0.05; started there, scales are still on their way up when
#: the training ends, and validation likelihood and calibration are worse (docs/quality.md).
INIT_SCALE = 0.3


def as_guide(guide: GuideLike, blora: BayesianLoRA, *, init_scale: float = INIT_SCALE, seed: int = 0) -> Guide:
    """Build the posterior family that ``guide`` names, started where the paper starts.

    Args:
        guide: ``"normal"`` (factorized, carried to the support of the prior), ``"layer_covariance"`` (a full
            covariance within each layer), ``"lowrank"``, ``"full_covariance"``, ``"flow"``, ``"delta"`` (MAP),
            ``"svgd"`` (particles) or ``"rank_mask"``; a class of ``pyro.infer.autoguide``, or an instance built on
            ``blora.prior``; a :class:`Guide`, returned as it is; or a callable ``blora -> Guide``. Other latents of
            the prior get a factorized guide beside s.
        blora: the LLM whose latents the guide describes.
        init_scale: largest initial standard deviation; scales start uniform on (init_scale / sqrt(2), init_scale).
        seed: of the initial scales.

    Raises:
        ValueError: an unknown name, or a family that cannot have the support of the prior.
        TypeError: something that is no guide.
    """
    if isinstance(guide, str):
        check_choice("guide", guide, NAMES)
        return _by_name(guide, blora, init_scale, seed)
    if isinstance(guide, type) and issubclass(guide, autoguide.AutoGuide):
        takes_scale = "init_scale" in inspect.signature(guide).parameters
        options: dict[str, Any] = {"init_scale": init_scale} if takes_scale else {}
        return AutoFamily(blora.prior, guide, init_loc_fn=blora.init_loc, **options).to(blora.device)
    built: Any = wrapped(cast(Any, guide)(blora) if _is_builder(guide) else guide)
    if not isinstance(built, Guide):
        raise TypeError(
            f"guide={guide!r}: expected one of {', '.join(NAMES)}, a class of pyro.infer.autoguide or an instance on "
            "blora.prior, a scalabl_pyro.guides.Guide, or a callable blora -> Guide."
        )
    return built


def wrapped(guide: object) -> object:
    """An AutoGuide as a :class:`Guide`; anything else as it is."""
    return AutoInstance(guide) if isinstance(guide, autoguide.AutoGuide) else guide


def to_config(guide: Guide) -> dict[str, Any]:
    """What is saved of a guide besides its tensors."""
    built_in = type(guide) is FAMILIES.get(guide.family or "")
    return {"family": guide.family if built_in else None, "class": type(guide).__name__, "options": guide.options()}


def from_options(family: str, options: dict[str, Any], blora: BayesianLoRA) -> Guide:
    """A saved family back, its tensors still to be filled.

    Raises:
        ValueError: an unknown family, or options that it refuses.
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
    """Whether ``guide`` is to be called with the LLM: neither a module, nor a class that wants more than an LLM."""
    if not callable(guide) or isinstance(guide, torch.nn.Module) or guide in FAMILIES.values():
        return False
    try:
        inspect.signature(guide).bind("blora")
    except (TypeError, ValueError):  # another number of arguments, or a built-in without a signature
        return False
    return True


def _by_name(name: str, blora: BayesianLoRA, init_scale: float, seed: int) -> Guide:
    sites = prior_sites(blora.prior)
    support = sites["s"]["fn"].support if "s" in sites else None
    loc = blora.adapter.loc.to(blora.device)
    scale = _initial_scale(init_scale, loc, seed)
    if support is not None and support.is_discrete:
        if name not in ("normal", "rank_mask"):
            check_continuous(f"guide={name!r}", sites)
        return RankMaskGuide(torch.logit(sites["s"]["fn"].mean.to(loc)))
    if name == "rank_mask":
        raise ValueError("guide='rank_mask' is for masks: use it with prior='rank_mask'.")
    real = support is None or support.check(torch.tensor([-1.0, 1.0]).to(loc).repeat(len(loc))[: len(loc)]).all()
    if name == "delta":  # AutoDelta moves a point within the support of its site
        return DeltaGuide(loc) if real and set(sites) == {"s"} else as_guide(autoguide.AutoDelta, blora)
    if not real:
        if name != "normal":
            limits = getattr(support, "base_constraint", support)
            raise ValueError(f"guide={name!r} needs latents on the real line; this prior's are {limits}: use 'normal'.")
        return MeanFieldGuide(blora.prior, start={"s": loc}, scale=init_scale)
    if name in ("layer_covariance", "full_covariance"):
        of_s: Guide = CovarianceGuide(loc, scale, ranks=blora.subspace.ranks if name == "layer_covariance" else None)
    elif name == "svgd":
        if set(sites) != {"s"}:
            raise ValueError("guide='svgd' moves particles of s alone; this prior has other latents too: use 'normal'.")
        of_s = ParticleGuide(loc, scale, seed=seed)
    elif name == "lowrank":
        of_s = LowRankGuide(loc, scale, rank=min(10, len(loc)), seed=seed)
    else:
        of_s = OF_S[name](loc, scale)
    return of_s if set(sites) <= {"s"} else WithHyperparameters(of_s, blora.prior, scale=init_scale)


def _initial_scale(largest: float, loc: torch.Tensor, seed: int) -> torch.Tensor:
    """Scale ~ Uniform(largest / sqrt(2), largest), as in the paper (there with largest = 0.05)."""
    if not 0 < largest < float("inf"):
        raise ValueError(f"init_scale={largest}: a standard deviation must be positive and finite.")
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(loc.shape, generator=generator, dtype=loc.dtype).to(loc.device)
    return largest * (0.5**0.5 + (1 - 0.5**0.5) * uniform)
