"""What training leaves: a frozen posterior, and all that is asked of it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from .._errors import check_positive
from ..analysis.checks import LOO, Diagnosis
from ..data.encoding import encode
from ..data.rows import read_rows
from ..prediction.draws import sample_prior
from ..prediction.linearized import predict_linearized
from ..prediction.predict import predict
from ..prediction.result import NumericPrediction, Prediction
from . import serialization
from .diagnose import diagnose
from .state import PosteriorState
from .to_arviz import as_arviz


@dataclass(frozen=True)
class Posterior(PosteriorState):
    """A posterior of s with the point estimates it was learned with.

    It holds copies of all that was learned, so several posteriors can share one LLM, and training goes on without
    changing an older one. Its fields are those of :class:`~scalabl_pyro.posterior.state.PosteriorState`.
    """

    def predict(
        self,
        data: Any,
        *,
        num_draws: int = 10,
        seed: int = 0,
        design: str = "independent",
        batch_size: int = 16,
        draws_per_pass: int | None = None,
        progress: bool = False,
    ) -> Prediction | NumericPrediction:
        """Predict rows under fixed posterior draws.

        Args:
            data: rows for the task (dicts, a ``datasets.Dataset``, the path of a JSONL file, a hub data set by name,
                of which the test split is read); answers are optional.
            num_draws: S; 0 predicts with the posterior mean.
            seed: of the draws.
            design: ``"antithetic"`` draws of a normal guide come in mirrored pairs, whose errors cancel where the
                outputs are nearly linear in s; ``"sobol"``: quasi-random.
            batch_size: rows of data a pass.
            draws_per_pass: draws a pass at most; default all, halved when memory runs out.
            progress: show a progress bar.

        Returns:
            :class:`~scalabl_pyro.prediction.result.Prediction` for classes, else
            :class:`~scalabl_pyro.prediction.result.NumericPrediction`.
        """
        for name, number in {"batch_size": batch_size, "draws_per_pass": draws_per_pass or 1}.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be positive.")
        draws = self.sample(num_draws, seed=seed, design=design)
        examples = encode(read_rows(data, split="test"), self.task.encode, need_target=False)
        return predict(
            self.llm(),
            self.task,
            draws.s,
            examples,
            batch_size=batch_size,
            draws_per_pass=draws_per_pass,
            is_mean=draws.is_mean,
            seed=seed,
            progress=progress,
        )

    @contextmanager
    def draw(self, index: int | None = None, *, seed: int = 0) -> Iterator[nn.Module]:
        """The plain LLM under one draw, for anything that calls it itself, such as ``generate``.

        Args:
            index: which draw; None for the posterior mean.
            seed: of the draws.
        """
        self.adapter.check_attached()
        s = self.mean() if index is None else self.sample(index + 1, seed=seed).s[index]
        llm = self.llm()
        with self.adapter.bind(s, factors=llm.factors, heads=llm.heads):
            yield self.adapter.module

    def predict_linearized(
        self, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
    ) -> Prediction | NumericPrediction:
        """Predict with outputs linear in s around the mean.

        One pass and one backward pass an output serve any number of draws, which are those of :meth:`predict`.

        Raises:
            TypeError: a guide that is not normal, so that the linear outputs would not be normal either.
            ValueError: no draws.
        """
        if num_draws < 1:
            raise ValueError(
                f"num_draws={num_draws} must be positive: without draws nothing is linearized, and "
                "predict(num_draws=0) is the prediction at the mean."
            )
        self._in_local_mode(self.guide.covariance)  # families that are not normal refuse
        draws = self.sample(num_draws, seed=seed)
        likelihood = self.log_likelihood(data, batch_size=batch_size, need_target=False)
        return predict_linearized(likelihood, self.mean(), draws.s, seed=seed)

    def predict_linearised(self, data: Any, **options: Any) -> Prediction | NumericPrediction:
        """Deprecated: the old name of :meth:`predict_linearized`."""
        warnings.warn("predict_linearised() is now called predict_linearized().", DeprecationWarning, stacklevel=2)
        return self.predict_linearized(data, **options)

    def prior_predictive(
        self, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
    ) -> Prediction | NumericPrediction:
        """Predict under draws of the *prior* of s, with the learned factors: what the prior means in probabilities."""
        check_positive(num_draws=num_draws)
        s = sample_prior(self.prior, num_draws, seed=seed)
        examples = encode(read_rows(data, split="test"), self.task.encode, need_target=False)
        return predict(self.llm(), self.task, s, examples, batch_size=batch_size, seed=seed)

    def loo(self, data: Any, **options: Any) -> LOO:
        """Leave-one-out predictive density on the training rows, corrected for q not being the posterior.

        Args:
            data: the training rows.
            options: of :meth:`log_weights`.
        """
        return self.log_weights(data, **options).loo()

    def diagnose(
        self,
        data: Any,
        *,
        history: pd.DataFrame | None = None,
        num_draws: int = 200,
        num_data: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Diagnosis:
        """Check the inference: ``posterior.diagnose(train_data, history=result.history)``.

        Args:
            data: the training rows, or a random part of them.
            history: of the fit, to see whether it had ended.
            num_draws: behind k-hat; its threshold is stricter for few.
            num_data: size of the training set, if ``data`` is a part of it.
            seed: of the draws.
            batch_size: rows a pass.

        Raises:
            ValueError: fewer than 25 draws, ``num_data`` smaller than ``data``.
        """
        return diagnose(
            self,
            read_rows(data),
            history=history,
            num_draws=num_draws,
            num_data=num_data,
            seed=seed,
            batch_size=batch_size,
        )

    def summary(self, *, num_draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row a layer: posterior mean and sd of its latents, averaged in quadrature over the rank."""
        s = self.sample(num_draws, seed=seed).s
        rows = [
            (part.mean(0).square().mean().sqrt().item(), part.var(0).mean().sqrt().item())
            for part in self.subspace.split(s)
        ]
        return pd.DataFrame(rows, columns=["rms_mean", "rms_sd"], index=pd.Index(self.subspace.names, name="layer"))

    def to_arviz(
        self, *, num_draws: int = 500, seed: int = 0, prediction: Prediction | NumericPrediction | None = None
    ) -> Any:
        """Draws as ArviZ data: ``InferenceData`` with arviz 0.x, ``xarray.DataTree`` with arviz 1.x.

        Args:
            num_draws: draws in the group ``posterior``.
            seed: of the draws.
            prediction: adds, for its rows and draws, the groups ``posterior_predictive``, and where the answers are
                known ``log_likelihood`` and ``observed_data``.
        """
        return as_arviz(self, num_draws=num_draws, seed=seed, prediction=prediction)

    def save_pretrained(self, path: str | Path) -> None:
        """Write safetensors and JSON to the directory ``path``; see :mod:`scalabl_pyro.posterior.serialization`."""
        serialization.save(path, self)

    @classmethod
    def from_pretrained(cls, llm: nn.Module, path: str | Path, **overrides: Any) -> "Posterior":
        """Read a posterior back for the base model it was learned on.

        Args:
            llm: the base model; it is given the LoRA layers unless it carries the same ones already.
            path: directory that :meth:`save_pretrained` wrote.
            overrides: ``task=``, ``prior=`` or ``guide=`` where the saved one is a class of your own.

        Raises:
            ValueError: another base model, missing or surplus tensors, wrong shapes, or a damaged file.
        """
        return cls(**serialization.load(path, llm, **overrides))
