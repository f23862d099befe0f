"""Posteriors of the LoRA factors A and B: a center, and noise around it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .._arguments import known_arguments_of_methods
from .._errors import check_choice, check_count
from .._process.memory import check_memory
from .._process.random_state import as_seed
from ..lora.binding import RowNoise
from ..lora.factors import Factors
from ..lora.forward import AdaptedLLM, num_rows
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..prediction.result import NumericPrediction, Prediction
from ..prediction.room import FEWER
from ..storage.tensor_files import check_keys, check_like
from . import saving
from .predictor import DerivedPredictor, Function, Predictor, predict_functions


class WeightNoise:
    """Base class of noise on the LoRA weights: a distribution of A and B of all layers around their center.

    Subclasses are dataclasses. Their fields are tensors (one per layer) or numbers that JSON can hold.

    Example:
        >>> noise = scalabl_pyro.baselines.SpectralNoise(0.01)
        >>> scalabl_pyro.baselines.FactorPosterior(point, noise).predict(test_data, num_draws=10)
    """

    #: Name of the family in saved files.
    family: ClassVar[str]

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Yield draws of the factors without end, on the CPU, in float32 or float64.

        Args:
            factors: Pairs (A, B) of the center, with y = W0 x + gamma B A x.
            generator: The only source of randomness, so that draw i depends only on the seed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draws(factors, generator).")

    def predict(
        self, center: Posterior, data: Any, *, num_draws: int, seed: int, batch_size: int, progress: bool
    ) -> Prediction | NumericPrediction:
        """Predict rows under draws of the factors of ``center``."""
        factors = plain_factors(center)
        check_room_for_factors(factors, num_draws)
        draws = self.draws(factors, torch.Generator().manual_seed(as_seed(seed)))
        functions = [as_function(center, next(draws)) for _ in range(num_draws)]
        return predict_functions(functions, center.task, data, seed=seed, batch_size=batch_size, progress=progress)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved as safetensors."""
        return {}

    def options(self) -> dict[str, Any]:
        """Return what is saved as JSON."""
        return {}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "WeightNoise":
        """Restore the noise. The saved tensors must fit the shapes of ``factors``, the factors of the center."""
        raise NotImplementedError(f"{cls.__name__} must define from_saved(options, tensors, factors).")


#: Families that saved files can name. The package fills it in, see ``__init__.py``.
NOISES: dict[str, type[WeightNoise]] = {}


@known_arguments_of_methods
@dataclass(frozen=True, repr=False)
class FactorPosterior(DerivedPredictor):
    """A posterior of A and B: a center, and noise around it.

    Attributes:
        center: Posterior whose mean is the center. It also gives the task and the heads.
        noise: Makes the draws.
        provenance: Method and settings that made the noise.

    Example:
        >>> posterior = scalabl_pyro.baselines.tfb(point, train_data)
        >>> posterior.predict(test_data, num_draws=10, seed=0).probs
    """

    kind: ClassVar[str] = "factors"

    center: Posterior
    noise: WeightNoise
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Predictor:
        """Center, which gives adapter and task."""
        return self.center

    def _own_facts(self) -> dict[str, object]:
        return {"method": repr(self.provenance.get("method", "")), "noise": self.noise}

    def sample(self, num_draws: int, *, seed: int = 0) -> list[Factors]:
        """Draw factors on the CPU, with y = W0 x + gamma B A x. Draw i does not depend on ``num_draws``."""
        check_count(num_draws=num_draws)
        factors = plain_factors(self.center)
        check_room_for_factors(factors, num_draws)
        draws = self.noise.draws(factors, torch.Generator().manual_seed(as_seed(seed)))
        return [next(draws) for _ in range(num_draws)]

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction | NumericPrediction:
        """Predict rows under fixed draws of the factors.

        Args:
            data: Rows for the task. Answers are optional.
            num_draws: Number of draws. 0 predicts with the center.
            seed: Seed of the draws.
            batch_size: Rows of data per forward pass.
            progress: Whether to show a progress bar.
        """
        if num_draws < 0:
            raise ValueError(f"num_draws={num_draws} must be 0 (the center) or more.")
        options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
        if num_draws == 0:
            return self.center.predict(data, num_draws=0, **options)
        return self.noise.predict(self.center, data, num_draws=num_draws, **options)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the center as a posterior, and the noise next to it. :func:`scalabl_pyro.baselines.load` reads it."""
        options = {"noise": self.noise.family, "options": self.noise.options(), "provenance": dict(self.provenance)}
        saving.save(path, self.kind, options, tensors=self.noise.tensors(), children={"center": self.center})

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Any]
    ) -> "FactorPosterior":
        """Build the posterior from what :func:`scalabl_pyro.baselines.load` has read."""
        center = children["center"]
        if not isinstance(center, Posterior):
            raise ValueError(f"The center of the factors must be a posterior, found a {type(center).__name__}.")
        check_choice("noise", options["noise"], NOISES)
        factors = plain_factors(center)
        noise = NOISES[options["noise"]].from_saved(options["options"], tensors, factors)
        check_keys("The saved noise", set(tensors), set(noise.tensors()))
        _check_draw(noise, factors)
        return cls(center, noise, options["provenance"])


def _check_draw(noise: WeightNoise, factors: Factors) -> None:
    """Check that a draw has the shapes of the factors and finite values."""
    drawn = next(iter(noise.draws(factors, torch.Generator().manual_seed(0))))
    for pair, own in zip(drawn, factors, strict=True):
        for value, like in zip(pair, own, strict=True):
            check_like("A factor drawn with the saved noise", value, like)
            if not torch.isfinite(value).all():
                raise ValueError("A factor drawn with the saved noise is not finite.")


def check_room_for_factors(factors: Factors, num_draws: int) -> None:
    """Check that draws of A and B fit into memory, before the first of them is made.

    Args:
        factors: Factors of the center, which have the size of a draw.
        num_draws: Number of draws that are in memory at once.

    Raises:
        ValueError: They do not fit.
    """
    size = sum(value.nbytes for pair in factors for value in pair)
    check_memory(f"{num_draws:,} draws of A and B", num_draws * size, FEWER)


def plain_factors(posterior: Posterior) -> Factors:
    """Return factors on the CPU with which the posterior mean is y = W0 x + gamma B A x, without s and gauge."""
    plain = []
    for (A, B), s in zip(posterior.factors, posterior.subspace.split(posterior.mean()), strict=True):
        rows = F.normalize(A, dim=-1) if posterior.adapter.gauge == "unit_rows" else A
        plain.append((rows.detach().cpu(), B.detach().cpu() * s.cpu().to(B.dtype)))
    return tuple(plain)


def as_function(posterior: Posterior, factors: Factors) -> Function:
    """Return the LLM with the heads of a posterior and the given plain factors."""
    llm = posterior.llm()
    adapter = posterior.adapter
    placed = tuple(
        (A.to(like.device, like.dtype), B.to(like.device, like.dtype))
        for (A, B), (like, _) in zip(factors, adapter.factors(), strict=True)
    )
    if adapter.gauge == "unit_rows":  # this gauge divides A by the norms of its rows, so s must hold the norms
        s = torch.cat([A.norm(dim=-1).cpu() for A, _ in placed])
    else:
        s = torch.ones(adapter.subspace.dim)
    return AdaptedLLM(adapter, factors=placed, heads=llm.heads), s.to(adapter.loc.dtype)


class NoisyLoRA(BayesianLoRA):
    """An adapted LLM that adds noise to A in training, different for each row. Subclasses define the noise."""

    adds_noise = True

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """Return the noise of each layer for ``rows`` rows, given the value of the site ``"s"``."""
        raise NotImplementedError(f"{type(self).__name__} must define row_noise(s, rows).")

    def forward(self, *args: Any, s: Tensor | None = None, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the LLM with s = 1 and noise in each layer. See :class:`~scalabl_pyro.BayesianLoRA`."""
        s = self.sample_latents() if s is None else s
        if s.shape[:-1].numel() != 1:
            raise ValueError(
                f"The site 's' has shape {tuple(s.shape)}, but this baseline takes one draw per batch. Use an ELBO "
                "without vectorized particles, and draws='shared'."
            )
        ones = torch.ones(self.subspace.dim, device=self.device, dtype=self.adapter.loc.dtype)
        noise = self.row_noise(s.reshape(-1), num_rows(args, kwargs))
        return self._adapted(*args, s=ones, positions=positions, noise=noise, **kwargs)
