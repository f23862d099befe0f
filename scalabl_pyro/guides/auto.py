"""Pyro's AutoGuides as posterior families."""

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from pyro.infer import autoguide
from pyro.nn import PyroModule
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from .._errors import nearest
from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from .._values import shown
from ..model.bayesian_lora import BayesianLoRA
from ..priors import Prior
from ..priors.sites import check_continuous, check_transforms, prior_sites
from .base import Guide
from .closed_form_kl import LowRankNormal

#: AutoGuides that need the likelihood or a discrete site. Here a guide is built from the prior alone.
UNSUPPORTED = ("AutoLaplaceApproximation", "AutoStructured", "AutoDiscreteParallel")
#: Classes of ``pyro.infer.autoguide`` that are not a family.
INCOMPLETE = ("AutoCallable", "AutoContinuous", "AutoGuide", "AutoGuideList")
#: AutoGuides that choose their own initial values and do not accept ``init_loc_fn``.
WITHOUT_INIT_LOC = (autoguide.AutoNormalizingFlow,)
#: Largest rank or width per latent that a saved file may ask for. A larger one only exhausts memory.
MAX_SIZE_PER_LATENT = 10
#: Number of draws behind the mean of a family whose mean has no closed form.
MEAN_DRAWS = 1000


class _AutoLowRank(autoguide.AutoLowRankMultivariateNormal):
    """Pyro's class, with a normal distribution for which the host does not wait."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> LowRankNormal:
        """Give the distribution of all latents as one vector."""
        scale = cast(Tensor, self.scale)
        return LowRankNormal(self.loc, self.cov_factor * scale.unsqueeze(-1), scale.square())


#: AutoGuides whose steps wait for the device, and what takes their place.
CAPTURABLE: dict[type[autoguide.AutoGuide], type[autoguide.AutoGuide]] = {
    autoguide.AutoLowRankMultivariateNormal: _AutoLowRank
}


class AutoFamily(Guide):
    """An AutoGuide over the latent sites of a prior.

    AutoGuides trace their model once to learn which sites exist. Here that model is the prior alone, so neither
    building nor loading a guide runs the LLM. All rows of a batch share one draw.

    Args:
        prior: Program that samples the latents.
        auto_class: Class of ``pyro.infer.autoguide``.
        init_loc_fn: Function that gives the initial value of each site, such as ``blora.init_loc``.
        auto_options: Keyword arguments of ``auto_class``, such as ``init_scale`` or ``rank``.

    Raises:
        ValueError: The class needs the likelihood or further options, or cannot have the support of the prior.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> guide = scalabl_pyro.guides.AutoFamily(blora.prior, AutoNormal, init_loc_fn=blora.init_loc)
        >>> guide.sample(2, seed=0)["s"].shape == (2, blora.subspace.dim)
        True
    """

    family = "auto"
    per_example = False
    scores_any_value = False

    def __init__(
        self,
        prior: Prior,
        auto_class: type[autoguide.AutoGuide],
        *,
        init_loc_fn: Callable[[Any], Tensor],
        **auto_options: Any,
    ) -> None:
        super().__init__()
        _check_supported(auto_class)
        sites = prior_sites(prior)
        check_continuous(f"guide={auto_class.__name__}", sites)
        check_transforms(f"guide={auto_class.__name__}", sites)
        self.is_point = auto_class is autoguide.AutoDelta
        self.has_density = not self.is_point
        self._arguments = (prior, auto_class, init_loc_fn, auto_options)
        if not issubclass(auto_class, WITHOUT_INIT_LOC):
            auto_options = {"init_loc_fn": init_loc_fn, **auto_options}
        _check_options(auto_class, auto_options)
        with local_params(), scoped_seed(0):
            self.auto = CAPTURABLE.get(auto_class, auto_class)(prior, **auto_options)
            self.auto()  # its prototype trace creates the parameters

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the latent sites; return s."""
        return self.auto()["s"]

    def mean(self) -> dict[str, Tensor]:
        """Return the median, which is the mean of symmetric families; for flows the average of MEAN_DRAWS draws."""
        return _center(self.auto)

    def options(self) -> dict[str, Any]:
        """Return class and keyword arguments."""
        _, auto_class, _, auto_options = self._arguments
        return {"class": auto_class.__name__, **auto_options}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "AutoFamily":
        """Rebuild the family; the caller fills its tensors.

        Raises:
            ValueError: The class is not one of Pyro's, or an option is unknown or out of range.
        """
        auto_class, options = check_saved_options(options, blora.subspace.dim)
        return cls(blora.prior, auto_class, init_loc_fn=blora.init_loc, **options)

    def snapshot(self) -> Guide:
        """Return a rebuilt copy. deepcopy would break the original: an AutoGuide drops its model to be pickled."""
        prior, auto_class, init_loc_fn, auto_options = self._arguments
        other = AutoFamily(prior, auto_class, init_loc_fn=init_loc_fn, **auto_options)
        other.load_state_dict(self.state_dict())
        return other.cpu().requires_grad_(False).eval()


def check_saved_options(options: Mapping[str, Any], dim: int) -> tuple[type[autoguide.AutoGuide], dict[str, Any]]:
    """Return the class of an AutoGuide and its keyword arguments, from the options in a file.

    Raises:
        ValueError: The class is not one of Pyro's, or an option is unknown or out of range.
    """
    name, options = options.get("class"), {k: v for k, v in options.items() if k != "class"}
    auto_class = getattr(autoguide, name, None) if isinstance(name, str) else None
    if not (isinstance(auto_class, type) and issubclass(auto_class, autoguide.AutoGuide)):
        raise ValueError(
            f"pyro.infer.autoguide has no class {shown(name)}. If it is your own, pass from_pretrained(..., "
            f"guide=lambda blora: AutoFamily(blora.prior, {shown(name)}, init_loc_fn=blora.init_loc))."
        )
    parameters = inspect.signature(auto_class).parameters.values()
    allowed = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    allowed -= {"model", "init_loc_fn", "create_plates"}
    limit = MAX_SIZE_PER_LATENT * dim
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(f"{name} has no option {shown(option)}. {nearest(option, allowed)}")
        sizes = value if isinstance(value, list) else [value]
        if not all(isinstance(size, int | float) and 0 <= size <= limit for size in sizes):
            raise ValueError(
                f"{name}: {option}={shown(value)} must be a number, or a list of numbers, from 0 to {limit}."
            )
    return auto_class, options


class AutoInstance(Guide):
    """An AutoGuide of Pyro that you built on the prior yourself: ``AutoNormal(blora.prior, init_scale=0.1)``.

    Training changes this instance. A saved posterior does not contain the arguments of the AutoGuide, so load it with
    ``from_pretrained(..., guide=lambda blora: AutoNormal(blora.prior, init_scale=0.1))``.

    Args:
        auto: AutoGuide instance. Unless it was called before, its model must not need arguments; a prior needs none.

    Raises:
        ValueError: This class of AutoGuide needs the likelihood too, or the model of ``auto`` needs arguments.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> guide = scalabl_pyro.guides.AutoInstance(AutoNormal(blora.prior, init_scale=0.1))
        >>> guide.sample(2, seed=0)["s"].shape == (2, blora.subspace.dim)
        True
    """

    per_example = False
    scores_any_value = False

    def __init__(self, auto: autoguide.AutoGuide) -> None:
        super().__init__()
        _check_supported(type(auto))
        self.is_point = isinstance(auto, autoguide.AutoDelta)
        self.has_density = not self.is_point
        for module in auto.modules():  # stock SVI or another fit may have called it before
            if isinstance(module, PyroModule):
                module._pyro_context.used = False
        self.auto = auto
        if auto.prototype_trace is None:
            name = type(auto).__name__
            try:
                with local_params(), scoped_seed(0):
                    auto()
            except TypeError as error:
                raise ValueError(
                    f"This {name} was built on a model that needs arguments ({error}): build it on the prior, "
                    f"{name}(blora.prior), or pass the class, guide={name}."
                ) from error

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the latent sites; return s, or all sites by name if none of them is s."""
        values = self.auto()
        return values.get("s", values)

    def mean(self) -> dict[str, Tensor]:
        """Return the median, or the average of MEAN_DRAWS draws, as :class:`AutoFamily` does."""
        return _center(self.auto)

    def options(self) -> dict[str, Any]:
        """Return the name of Pyro's class."""
        return {"class": type(self.auto).__name__}

    def snapshot(self) -> Guide:
        """Return a copy that shares model and prototype trace with the original; deepcopy alone would break it."""
        auto = self.auto
        kept = {"_model": auto._model, "master": auto.master}
        functions = [v for v in vars(auto).values() if callable(v) and not isinstance(v, torch.nn.Module)]
        shared = [auto.prototype_trace, *functions]  # copying a bound init_loc_fn would copy the whole LLM
        try:
            twin = copy.deepcopy(auto, {id(value): value for value in shared})
        finally:
            vars(auto).update(kept)
        vars(twin).update(kept)
        return AutoInstance(twin).cpu().requires_grad_(False).eval()


def check_not_messenger(guide: object) -> None:
    """Refuse the messengers of Pyro, which run their model and so hold no family that a posterior could keep.

    Raises:
        ValueError: ``guide`` is a messenger, or a class of them.
    """
    auto_class = guide if isinstance(guide, type) else type(guide)
    if issubclass(auto_class, GuideMessenger):
        raise ValueError(
            f"{auto_class.__name__} is a messenger, not an AutoGuide: use guide='normal', which is the family of "
            "AutoNormalMessenger, or the messenger with stock SVI on your own model."
        )


def _check_supported(auto_class: type) -> None:
    name = auto_class.__name__
    if name in UNSUPPORTED:
        raise ValueError(f"{name} needs more than the prior of s: use it with stock SVI on your own model.")
    if name in INCOMPLETE:
        raise ValueError(f"{name} is not a family by itself: pass a class such as AutoNormal, or write a Guide.")


def _check_options(auto_class: type, options: dict[str, Any]) -> None:
    """Check that a class gets all options that it needs."""
    try:
        inspect.signature(auto_class).bind("prior", **options)
    except TypeError as error:
        name = auto_class.__name__
        raise ValueError(
            f"{name}: {error}. Pass its options, as in guide=lambda blora: AutoFamily(blora.prior, {name}, "
            "init_loc_fn=blora.init_loc, ...)."
        ) from None


def _center(auto: Any) -> dict[str, Tensor]:
    """Median of each site; where it has no closed form, the average of MEAN_DRAWS draws."""
    with local_params():
        try:
            return auto.median()
        except NotImplementedError:
            with torch.no_grad(), scoped_seed(0):
                draws = [auto() for _ in range(MEAN_DRAWS)]
            return {name: torch.stack([d[name] for d in draws]).mean(0) for name in draws[0]}
