"""Posterior families, one file each: ``guide=`` of :func:`scalabl_pyro.fit` is resolved here."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.infer import autoguide

from .._errors import check_choice
from ..model import BayesianLoRA
from .auto import AutoFamily
from .base import Guide
from .delta import DeltaGuide
from .normal import NormalGuide

__all__ = ["AutoFamily", "DeltaGuide", "Guide", "NormalGuide", "as_guide"]

GuideLike = str | type[autoguide.AutoGuide] | Guide | Callable[[BayesianLoRA], Guide]

#: Families that a saved posterior can name.
FAMILIES: dict[str, type[Guide]] = {"normal": NormalGuide, "delta": DeltaGuide, "auto": AutoFamily}
NAMES = ("normal", "delta")


def as_guide(guide: GuideLike, blora: BayesianLoRA, *, init_scale: float = 0.05, seed: int = 0) -> Guide:
    """Build the posterior family that ``guide`` names, started where the paper starts.

    Args:
        guide: ``"normal"`` or ``"delta"``; a class of ``pyro.infer.autoguide``; a :class:`Guide`, returned as it
            is; or a callable ``blora -> Guide``.
        blora: the LLM whose latents the guide describes.
        init_scale: largest initial standard deviation; scales start uniform on (init_scale / sqrt(2), init_scale).
        seed: of the initial scales.

    Raises:
        ValueError: an unknown name.
        TypeError: something that is no guide.
    """
    loc = blora.adapter.loc.to(blora.device)
    if isinstance(guide, str):
        check_choice("guide", guide, NAMES)
        if guide == "delta":
            return DeltaGuide(loc)
        return NormalGuide(loc, _initial_scale(init_scale, loc, seed))
    if isinstance(guide, type) and issubclass(guide, autoguide.AutoGuide):
        takes_scale = "init_scale" in inspect.signature(guide).parameters
        options: dict[str, Any] = {"init_scale": init_scale} if takes_scale else {}
        return AutoFamily(blora.prior, guide, init_loc_fn=blora.init_loc, **options).to(blora.device)
    built: Any = guide if isinstance(guide, Guide) or not callable(guide) else cast(Any, guide)(blora)
    if not isinstance(built, Guide):
        raise TypeError(
            f"guide={guide!r}: expected one of {', '.join(NAMES)}, a class of pyro.infer.autoguide, a "
            "scalabl_pyro.guides.Guide, or a callable blora -> Guide."
        )
    return built


def describe(guide: Guide) -> dict[str, Any]:
    """What is saved of a guide besides its tensors."""
    built_in = type(guide) is FAMILIES.get(guide.family or "")
    return {"family": guide.family if built_in else None, "class": type(guide).__name__, "options": guide.options()}


def from_options(family: str, options: dict[str, Any], blora: BayesianLoRA) -> Guide:
    """A saved family back, its tensors still to be filled.

    Raises:
        ValueError: an unknown family, or options that it refuses.
    """
    check_choice("family", family, FAMILIES)
    return FAMILIES[family].from_options(options, blora)


def _initial_scale(largest: float, loc: torch.Tensor, seed: int) -> torch.Tensor:
    """Scale ~ Uniform(largest / sqrt(2), largest), as in the paper (there with largest = 0.05)."""
    if not 0 < largest < float("inf"):
        raise ValueError(f"init_scale={largest}: a standard deviation must be positive and finite.")
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(loc.shape, generator=generator, dtype=loc.dtype).to(loc.device)
    return largest * (0.5**0.5 + (1 - 0.5**0.5) * uniform)
