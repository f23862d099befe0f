"""Pyro's AutoGuides as posterior families."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import autoguide
from pyro.nn import PyroModule
from torch import Tensor

from .._errors import nearest
from .._process.pyro_modes import local_params
from .._process.random_state import scoped_seed
from ..model.bayesian_lora import BayesianLoRA
from ..priors import Prior
from ..priors.sites import check_continuous, prior_sites
from .base import Guide

#: Need the likelihood, or a discrete site, where a family here is built from the prior alone.
UNSUPPORTED = (
    "AutoLaplaceApproximation",
    "AutoStructured",
    "AutoDiscreteParallel",
    "AutoSemiDAIS",
    "AutoRegressiveMessenger",
)
#: Choose their own start and refuse ``init_loc_fn``.
WITHOUT_INIT_LOC = (autoguide.AutoNormalizingFlow,)
#: Largest rank or width that a file may ask for, for each latent: what is larger only exhausts memory.
MAX_SIZE_PER_LATENT = 10
#: Draws behind the mean of a family whose mean has no closed form.
MEAN_DRAWS = 1000


class AutoFamily(Guide):
    """An AutoGuide over the latent sites of a prior.

    AutoGuides learn which sites exist by tracing their model once. Here that model is the prior alone, so neither
    building nor loading a guide runs the LLM. All rows of a batch share a draw.

    Args:
        prior: the program that samples the latents.
        auto_class: a class of ``pyro.infer.autoguide``.
        init_loc_fn: where the sites start.
        auto_options: Keyword arguments of the class, such as ``init_scale`` or ``rank``.

    Raises:
        ValueError: a class that needs the likelihood, or a prior of discrete latents.
    """

    family = "auto"
    per_example = False

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
        check_continuous(f"guide={auto_class.__name__}", prior_sites(prior))
        self.has_density = auto_class is not autoguide.AutoDelta
        self._arguments = (prior, auto_class, init_loc_fn, auto_options)
        if not issubclass(auto_class, WITHOUT_INIT_LOC):
            auto_options = {"init_loc_fn": init_loc_fn, **auto_options}
        with local_params(), scoped_seed(0):
            self.auto = auto_class(prior, **auto_options)
            self.auto()  # its prototype trace creates the parameters

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the latent sites; return s."""
        return self.auto()["s"]

    def mean(self) -> dict[str, Tensor]:
        """The median, which is the mean of the symmetric families; of flows the average of MEAN_DRAWS draws."""
        return _center(self.auto)

    def options(self) -> dict[str, Any]:
        """Class and keyword arguments."""
        _, auto_class, _, auto_options = self._arguments
        return {"class": auto_class.__name__, **auto_options}

    @classmethod
    def from_options(cls, options: dict[str, Any], blora: BayesianLoRA) -> "AutoFamily":
        """The family again, its tensors to be filled."""
        name, options = options.get("class"), {k: v for k, v in options.items() if k != "class"}
        auto_class = getattr(autoguide, name, None) if isinstance(name, str) else None
        if not (isinstance(auto_class, type) and issubclass(auto_class, autoguide.AutoGuide)):
            raise ValueError(
                f"{name!r} names no class of pyro.infer.autoguide. If it is your own, pass from_pretrained(..., "
                f"guide=lambda blora: AutoFamily(blora.prior, {name}, init_loc_fn=blora.init_loc))."
            )
        allowed = set(inspect.signature(auto_class).parameters) - {"model", "init_loc_fn", "create_plates", "kwargs"}
        limit = MAX_SIZE_PER_LATENT * blora.subspace.dim
        for option, value in options.items():
            if option not in allowed:
                raise ValueError(f"{name} has no option {option!r} to save. {nearest(option, allowed)}")
            sizes = value if isinstance(value, list) else [value]
            if not all(isinstance(size, int | float) and 0 <= size <= limit for size in sizes):
                raise ValueError(f"{name}: {option}={value!r} is no number (or list of numbers) between 0 and {limit}.")
        return cls(blora.prior, auto_class, init_loc_fn=blora.init_loc, **options)

    def snapshot(self) -> Guide:
        """A rebuilt copy: deepcopy would break the AutoGuide it copies, which drops its model to be pickled."""
        prior, auto_class, init_loc_fn, auto_options = self._arguments
        other = AutoFamily(prior, auto_class, init_loc_fn=init_loc_fn, **auto_options)
        other.load_state_dict(self.state_dict())
        return other.cpu().requires_grad_(False).eval()


class AutoInstance(Guide):
    """An AutoGuide that was built already, on the prior: ``AutoNormal(blora.prior, init_scale=0.1)``.

    It is trained in place. How it was built is not known, so that a saved posterior of it is loaded with
    ``from_pretrained(..., guide=lambda blora: AutoNormal(blora.prior, init_scale=0.1))``.

    Args:
        auto: the instance; where it has not been called yet, its model must need no arguments.

    Raises:
        ValueError: a class that needs the likelihood, or a model that needs arguments.
    """

    per_example = False

    def __init__(self, auto: autoguide.AutoGuide) -> None:
        super().__init__()
        _check_supported(type(auto))
        self.has_density = not isinstance(auto, autoguide.AutoDelta)
        for module in auto.modules():  # it may have been called before, by stock SVI or in another fit
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
        """Sample the latent sites; return s, or what there is without it."""
        values = self.auto()
        return values.get("s", values)

    def mean(self) -> dict[str, Tensor]:
        """As that of :class:`AutoFamily`."""
        return _center(self.auto)

    def options(self) -> dict[str, Any]:
        """The class of Pyro."""
        return {"class": type(self.auto).__name__}

    def snapshot(self) -> Guide:
        """A copy that shares model and prototype trace with the original, which a plain copy would break."""
        auto = self.auto
        kept = {"_model": auto._model, "master": auto.master}
        functions = [v for v in vars(auto).values() if callable(v) and not isinstance(v, torch.nn.Module)]
        shared = [auto.prototype_trace, *functions]  # a bound init_loc_fn would bring the whole LLM
        try:
            twin = copy.deepcopy(auto, {id(value): value for value in shared})
        finally:
            vars(auto).update(kept)
        vars(twin).update(kept)
        return AutoInstance(twin).cpu().requires_grad_(False).eval()


def _check_supported(auto_class: type) -> None:
    if auto_class.__name__ in UNSUPPORTED:
        raise ValueError(
            f"{auto_class.__name__} needs more than the prior of s: use it with stock SVI on a model of your own."
        )


def _center(auto: Any) -> dict[str, Tensor]:
    """The median of each site; where it has no closed form, the average of MEAN_DRAWS draws."""
    with local_params():
        try:
            return auto.median()
        except NotImplementedError:
            with torch.no_grad(), scoped_seed(0):
                draws = [auto() for _ in range(MEAN_DRAWS)]
            return {name: torch.stack([d[name] for d in draws]).mean(0) for name in draws[0]}
