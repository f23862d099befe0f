"""Pyro's AutoGuides as posterior families."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import autoguide
from torch import Tensor

from .._errors import nearest
from .._pyro import local_params
from .._rng import scoped_seed
from ..model import BayesianLoRA
from ..priors import Prior
from .base import Guide
from .mean_field import check_continuous, prior_sites

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
        options: its keyword arguments, such as ``init_scale`` or ``rank``.
        init_loc_fn: where the sites start.

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
        if auto_class.__name__ in UNSUPPORTED:
            raise ValueError(
                f"{auto_class.__name__} needs more than the prior of s: use it with stock SVI on a model of your own."
            )
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
        with local_params():
            try:
                return self.auto.median()
            except NotImplementedError:
                with torch.no_grad(), scoped_seed(0):
                    draws = [self.auto() for _ in range(MEAN_DRAWS)]
                return {name: torch.stack([d[name] for d in draws]).mean(0) for name in draws[0]}

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
