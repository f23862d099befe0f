"""Posteriors over the factors A and B themselves: a point posterior, and noise that makes draws of its factors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .._errors import check_choice, check_positive
from ..lora.adapter import Adapter, RowNoise
from ..lora.factors import Factors
from ..lora.forward import AdaptedLLM, num_rows
from ..model.bayesian_lora import BayesianLoRA
from ..posterior.posterior import Posterior
from ..prediction.result import NumericPrediction, Prediction
from ..storage.tensor_files import check_keys, check_like
from ..tasks import Task
from . import saving
from .predictor import Function, predict_functions


class FactorNoise:
    """A distribution over the factors of all layers around those of a point posterior.

    Subclasses are dataclasses whose fields are tensors by layer or JSON-able numbers.
    """

    #: Name under which it is saved.
    family: ClassVar[str]

    def draws(self, factors: Factors, generator: Generator) -> Iterator[Factors]:
        """Endless draws on the CPU, float32 or better.

        Args:
            factors: (A, B) of the center, with y = W0 x + gamma B A x.
            generator: the only source of randomness, so that draw i depends on its seed alone.
        """
        raise NotImplementedError(f"{type(self).__name__} must define draws(factors, generator).")

    def predict(
        self, center: Posterior, data: Any, *, num_draws: int, seed: int, batch_size: int, progress: bool
    ) -> Prediction | NumericPrediction:
        """Predict rows under draws of the factors of ``center``."""
        draws = self.draws(plain_factors(center), torch.Generator().manual_seed(seed))
        functions = [as_function(center, next(draws)) for _ in range(num_draws)]
        return predict_functions(functions, center.task, data, seed=seed, batch_size=batch_size, progress=progress)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved as safetensors."""
        return {}

    def options(self) -> dict[str, Any]:
        """What is saved as JSON."""
        return {}

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], factors: Factors) -> "FactorNoise":
        """The noise again; ``factors`` are those of the center, whose shapes the tensors must fit."""
        raise NotImplementedError(f"{cls.__name__} must define from_saved(options, tensors, factors).")


#: Families that a saved baseline can name; filled in by the package, see ``__init__.py``.
NOISES: dict[str, type[FactorNoise]] = {}


@dataclass(frozen=True)
class FactorPosterior:
    """A distribution over A and B, by its center and the noise around it.

    Attributes:
        center: a posterior whose mean is the center: task, heads, and factors.
        noise: makes the draws.
        provenance: how the noise came about.
    """

    kind: ClassVar[str] = "factors"

    center: Posterior
    noise: FactorNoise
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The LoRA layers inside the LLM."""
        return self.center.adapter

    @property
    def task(self) -> Task:
        """The likelihood."""
        return self.center.task

    def blora(self) -> BayesianLoRA:
        """The adapted LLM, to unload."""
        return self.center.blora()

    def sample(self, num_draws: int, *, seed: int = 0) -> list[Factors]:
        """Draws of the factors on the CPU, y = W0 x + gamma B A x; draw i is the same whatever their number."""
        check_positive(num_draws=num_draws)
        draws = self.noise.draws(plain_factors(self.center), torch.Generator().manual_seed(seed))
        return [next(draws) for _ in range(num_draws)]

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction | NumericPrediction:
        """Predict rows under fixed draws of the factors.

        Args:
            data: rows for the task; answers are optional.
            num_draws: S; 0 predicts with the center.
            seed: of the draws.
            batch_size: rows of data a pass.
            progress: show a progress bar.
        """
        if num_draws < 0:
            raise ValueError(f"num_draws={num_draws} must be 0 (the center) or more.")
        options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
        if num_draws == 0:
            return self.center.predict(data, num_draws=0, **options)
        return self.noise.predict(self.center, data, num_draws=num_draws, **options)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the center as a posterior, and the noise beside it; :func:`scalabl_pyro.baselines.load` reads it."""
        options = {"noise": self.noise.family, "options": self.noise.options(), "provenance": dict(self.provenance)}
        saving.save(path, self.kind, options, tensors=self.noise.tensors(), children={"center": self.center})

    @classmethod
    def from_saved(
        cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor], children: Mapping[str, Any]
    ) -> "FactorPosterior":
        """What :func:`scalabl_pyro.baselines.load` read."""
        center = children["center"]
        if not isinstance(center, Posterior):
            raise ValueError(f"The center of the factors must be a posterior, found a {type(center).__name__}.")
        check_choice("noise", options["noise"], NOISES)
        factors = plain_factors(center)
        noise = NOISES[options["noise"]].from_saved(options["options"], tensors, factors)
        check_keys("The saved noise", set(tensors), set(noise.tensors()))
        _check_draw(noise, factors)
        return cls(center, noise, options["provenance"])


def _check_draw(noise: FactorNoise, factors: Factors) -> None:
    """A draw has the shapes of the factors, and finite numbers."""
    drawn = next(iter(noise.draws(factors, torch.Generator().manual_seed(0))))
    for pair, own in zip(drawn, factors, strict=True):
        for value, like in zip(pair, own, strict=True):
            check_like("A factor drawn with the saved noise", value, like)
            if not torch.isfinite(value).all():
                raise ValueError("A factor drawn with the saved noise is not finite.")


def plain_factors(posterior: Posterior) -> Factors:
    """Factors on the CPU in which the posterior mean computes y = W0 x + gamma B A x, without s and gauge."""
    plain = []
    for (A, B), s in zip(posterior.factors, posterior.subspace.split(posterior.mean()), strict=True):
        rows = F.normalize(A, dim=-1) if posterior.adapter.gauge == "unit_rows" else A
        plain.append((rows.detach().cpu(), B.detach().cpu() * s.cpu().to(B.dtype)))
    return tuple(plain)


def as_function(posterior: Posterior, factors: Factors) -> Function:
    """The LLM with heads and task of a posterior, and plain factors of its own."""
    llm = posterior.llm()
    adapter = posterior.adapter
    placed = tuple(
        (A.to(like.device, like.dtype), B.to(like.device, like.dtype))
        for (A, B), (like, _) in zip(factors, adapter.factors(), strict=True)
    )
    if adapter.gauge == "unit_rows":  # which takes the norms out of A; s puts them back
        s = torch.cat([A.norm(dim=-1).cpu() for A, _ in placed])
    else:
        s = torch.ones(adapter.subspace.dim)
    return AdaptedLLM(adapter, factors=placed, heads=llm.heads), s.to(adapter.loc.dtype)


class NoisyLoRA(BayesianLoRA):
    """An adapted LLM whose layers compute with noisy A; subclasses define the noise of a pass."""

    def row_noise(self, s: Tensor, rows: int) -> Sequence[RowNoise]:
        """Noise of each layer for a pass of ``rows`` rows, given the value of the site ``"s"``."""
        raise NotImplementedError(f"{type(self).__name__} must define row_noise(s, rows).")

    def forward(self, *args: Any, s: Tensor | None = None, positions: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the LLM with s = 1 and noise in each layer, see :class:`~scalabl_pyro.BayesianLoRA`."""
        s = self.sample_latents() if s is None else s
        if s.shape[:-1].numel() != 1:
            raise ValueError(
                f"The site 's' has shape {tuple(s.shape)}: rows share one draw here, which their own signs or masks "
                "make different. Use an ELBO without vectorized particles, and draws='shared'."
            )
        ones = torch.ones(self.subspace.dim, device=self.device, dtype=self.adapter.loc.dtype)
        noise = self.row_noise(s.reshape(-1), num_rows(args, kwargs))
        return self._adapted(*args, s=ones, positions=positions, noise=noise, **kwargs)
