"""The interface of every trained method, and prediction under functions that each have factors of their own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._arguments import known_arguments_of_methods
from .._display import Summarized, html_table
from ..data.batch import Batch
from ..data.encoding import encode_data
from ..lora.adapter import Adapter
from ..lora.forward import AdaptedLLM
from ..lora.hidden_state_cache import Prefix, reuse
from ..model.bayesian_lora import BayesianLoRA
from ..model.passes import Passes
from ..prediction.collect import predict_batches
from ..prediction.result import NumericPrediction, Prediction
from ..tasks import Task
from ..training.result import evaluations_of, last_step

Function = tuple[AdaptedLLM, Tensor]
"""An LLM with its own factors, and the latents s (D,) that it is called with."""


@runtime_checkable
class Predictor(Protocol):
    """The interface of every trained method; :class:`~scalabl_pyro.Posterior` satisfies it.

    Example:
        >>> assert isinstance(posterior, scalabl_pyro.baselines.Predictor)
        >>> posterior.predict(test_data, num_draws=10, seed=0).metrics()
    """

    @property
    def adapter(self) -> Adapter:
        """LoRA layers inside the LLM."""

    @property
    def task(self) -> Task:
        """Task that defines the likelihood."""

    def blora(self) -> BayesianLoRA:
        """Return the adapted LLM, for example to unload it."""

    def predict(
        self, data: Any, *, num_draws: int = 10, seed: int = 0, batch_size: int = 16, progress: bool = False
    ) -> Prediction | NumericPrediction:
        """Predict rows under fixed draws: draw i of a seed is the same function for every batch."""

    def save_pretrained(self, path: str | Path) -> None:
        """Write safetensors and JSON to the directory ``path``."""


@known_arguments_of_methods
class DerivedPredictor(Summarized, ABC):
    """A predictor that is built on another one, and shares its adapted LLM and task."""

    @property
    @abstractmethod
    def source(self) -> Predictor:
        """Predictor that this one is built on."""

    @property
    def adapter(self) -> Adapter:
        """LoRA layers inside the LLM."""
        return self.source.adapter

    @property
    def task(self) -> Task:
        """Task that defines the likelihood."""
        return self.source.task

    def blora(self) -> BayesianLoRA:
        """Return the adapted LLM, for example to unload it."""
        return self.source.blora()

    @abstractmethod
    def _own_facts(self) -> dict[str, object]:
        """Facts of this kind of predictor, by name."""

    def _summary(self) -> Mapping[str, object]:
        return self._own_facts() | {"layers": len(self.adapter.layers), "task": type(self.task).__name__}


@dataclass(frozen=True)
class BaselineResult:
    """Posterior and history of a baseline whose draws differ in more than s.

    Attributes:
        posterior: Predicts rows and saves itself.
        history: One row per step, as in the result of :func:`scalabl_pyro.fit`.

    Example:
        >>> result = scalabl_pyro.baselines.blob(llm, task, train_data, num_steps=1000)
        >>> result.history["loss"].plot()
    """

    posterior: Predictor
    history: pd.DataFrame

    @property
    def evaluations(self) -> pd.DataFrame:
        """Rows of the history in which held-out rows were scored; see :attr:`scalabl_pyro.FitResult.evaluations`.

        Raises:
            ValueError: The method had no ``eval_data``.
        """
        return evaluations_of(self.history)

    def __repr__(self) -> str:
        return f"BaselineResult(\n  posterior={self.posterior!r},\n  history={len(self.history)} steps,\n)"

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        return html_table("BaselineResult", (last_step(self.history) | {"posterior": self.posterior}).items())


def predict_functions(
    functions: Sequence[Function],
    task: Task,
    data: Any,
    *,
    seed: int = 0,
    batch_size: int = 16,
    is_mean: bool = False,
    progress: bool = False,
) -> Prediction | NumericPrediction:
    """Predict rows under S functions, with one forward pass per function and batch.

    Args:
        functions: S functions that share one adapter.
        task: Task that defines the likelihood.
        data: Rows for the task.
        seed: Seed of the simulated answers of a likelihood over numbers.
        batch_size: Rows per forward pass.
        is_mean: Whether the only function is the posterior mean.
        progress: Whether to show a progress bar.
    """
    examples = encode_data(data, task.encode, need_target=False, split="test")
    adapter = functions[0][0].adapter
    passes = Passes.over(examples, task, adapter, batch_size=batch_size)

    def outputs_of(batch: Batch) -> Tensor:
        with reuse(adapter, Prefix() if adapter.has_fixed_prefix else None):  # the lower blocks run once for all
            return torch.stack([task.outputs(llm, batch, s.to(adapter.device)) for llm, s in functions])

    return predict_batches(passes, outputs_of, task, examples, seed=seed, is_mean=is_mean, progress=progress)


def concatenate(predictions: Sequence[Prediction | NumericPrediction]) -> Prediction | NumericPrediction:
    """Join the draws of several predictions of the same rows along the first axis."""
    first = predictions[0]
    joined: dict[str, Any] = {}
    for name in first.PER_DRAW:
        parts = [cast(Any, getattr(p, name)) for p in predictions]
        joined[name] = None if parts[0] is None else np.concatenate(parts)
    seconds = sum(p.seconds for p in predictions)
    return replace(first, is_mean=False, seconds=seconds, **joined)
