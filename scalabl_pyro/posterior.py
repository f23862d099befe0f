"""What training leaves: a frozen posterior, and all that is asked of it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from . import serialization
from ._errors import check_choice, check_positive
from ._pyro import local_params
from .adapted import AdaptedLLM
from .arviz_groups import as_arviz
from .data import encode
from .diagnostics import LOO, Diagnosis, LogWeights, diagnose
from .draws import Draws, log_prior, sample, sample_prior
from .factors import Factors
from .guides import Guide
from .likelihoods import Task
from .linearised import predict_linearised
from .logdensity import LogLikelihood
from .lora import Adapter
from .model import BayesianLoRA
from .prediction import NumericPrediction, Prediction
from .predictive import predict
from .priors import Prior
from .quasi import DESIGNS, even_draws
from .rows import read_rows
from .subspace import Subspace

Result = TypeVar("Result")


@dataclass(frozen=True)
class Posterior:
    """A posterior of s with the point estimates it was learned with.

    It holds copies of all that was learned, so several posteriors can share one LLM, and training goes on without
    changing an older one.

    Attributes:
        adapter: the LoRA layers inside the LLM.
        task: the likelihood, with its learned parameters.
        prior: the Pyro program that samples the latents.
        guide: the fitted family, on the CPU.
        factors: (A, B) of each layer.
        heads: trained heads by module path.
        provenance: how it came about (seed, steps, size of the data, versions).
    """

    adapter: Adapter
    task: Task
    prior: Prior
    guide: Guide
    factors: Factors
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(cls, blora: BayesianLoRA, task: Task, guide: Guide, *, provenance: Mapping[str, Any]) -> "Posterior":
        """Copy the present state of an LLM, a task and a guide."""
        return cls(
            adapter=blora.adapter,
            task=serialization.copy_task(task).requires_grad_(False),
            prior=copy.deepcopy(blora.prior).cpu().requires_grad_(False),
            guide=guide.snapshot(),
            factors=tuple((A.detach().clone(), B.detach().clone()) for A, B in blora.adapter.factors()),
            heads={name: copy.deepcopy(head).requires_grad_(False) for name, head in blora.adapter.heads.items()},
            provenance=dict(provenance),
        )

    @property
    def subspace(self) -> Subspace:
        """Which latent belongs to which layer."""
        return self.adapter.subspace

    def blora(self) -> BayesianLoRA:
        """The LLM as a Pyro program again, to train on or to unload."""
        return BayesianLoRA(self.adapter, prior=copy.deepcopy(self.prior).requires_grad_(True))

    def mean(self) -> Tensor:
        """(D,) posterior mean of s."""
        with torch.no_grad(), local_params():
            return self.guide.mean()["s"].detach().clone()

    def sample(self, num_draws: int, *, seed: int = 0, design: str = "independent") -> Draws:
        """Draw from the posterior; 0 draws give its mean as the only one.

        ``design="antithetic"`` or ``"sobol"`` spreads the draws of a normal guide more evenly, see
        :mod:`scalabl_pyro.quasi`.

        Draws are made one by one on the CPU, so that draw i depends on the seed alone: not on how many are asked
        for, nor on the device of the LLM.

        Raises:
            ValueError: a negative number of draws.
        """
        if num_draws < 0:
            raise ValueError(f"num_draws={num_draws} must be 0 (the posterior mean) or more.")
        check_choice("design", design, DESIGNS)
        if design == "independent" or num_draws == 0:
            return sample(self.guide, num_draws, seed=seed)
        return self._in_local_mode(lambda: even_draws(self.guide, num_draws, seed=seed, design=design))

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
            :class:`~scalabl_pyro.prediction.Prediction` for classes, else
            :class:`~scalabl_pyro.prediction.NumericPrediction`.
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

    def llm(self) -> AdaptedLLM:
        """The LLM with this posterior's factors and heads, as a function of s."""
        device = self.adapter.device
        heads = {name: head.to(device) for name, head in self.heads.items()}
        factors = tuple(
            (A.to(live_A.device), B.to(live_B.device))
            for (A, B), (live_A, live_B) in zip(self.factors, self.adapter.factors(), strict=True)
        )
        return AdaptedLLM(self.adapter, factors=factors, heads=heads)

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

    def predict_linearised(
        self, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
    ) -> Prediction | NumericPrediction:
        """Predict with outputs linear in s around the mean, see :func:`scalabl_pyro.linearised.predict_linearised`.

        One pass and one backward pass an output serve any number of draws, which are those of :meth:`predict`.

        Raises:
            TypeError: a guide that is not normal, so that the linear outputs would not be normal either.
            ValueError: no draws.
        """
        if num_draws < 1:
            raise ValueError(
                f"num_draws={num_draws} must be positive: without draws nothing is linearised, and "
                "predict(num_draws=0) is the prediction at the mean."
            )
        self._in_local_mode(self.guide.covariance)  # families that are not normal refuse
        draws = self.sample(num_draws, seed=seed)
        likelihood = self.log_likelihood(data, batch_size=batch_size, need_target=False)
        return predict_linearised(likelihood, self.mean(), draws.s, seed=seed)

    def prior_predictive(
        self, data: Any, *, num_draws: int = 100, seed: int = 0, batch_size: int = 16
    ) -> Prediction | NumericPrediction:
        """Predict under draws of the *prior* of s, with the learned factors: what the prior means in probabilities."""
        check_positive(num_draws=num_draws)
        s = sample_prior(self.prior, num_draws, seed=seed)
        examples = encode(read_rows(data, split="test"), self.task.encode, need_target=False)
        return predict(self.llm(), self.task, s, examples, batch_size=batch_size, seed=seed)

    def log_weights(
        self, data: Any, *, num_draws: int = 200, num_data: int | None = None, seed: int = 0, batch_size: int = 16
    ) -> LogWeights:
        """Densities of draws under the joint model: what ELBO, k-hat and LOO are made of.

        Args:
            data: the training rows, or a random part of them.
            num_draws: S.
            num_data: size of the training set, if ``data`` is a part of it.
            seed: of the draws.
            batch_size: rows a pass.

        Raises:
            ValueError: ``num_data`` smaller than ``data``, rows without an answer.
        """
        likelihood = self.log_likelihood(data, batch_size=batch_size, need_target=True)
        if num_data is not None and num_data < likelihood.num_data:
            raise ValueError(
                f"num_data={num_data}, but data alone has {likelihood.num_data} rows: num_data is the size of the "
                "training set that data is a part of. Leave it out where data is all of it."
            )
        draws = self.sample(num_draws, seed=seed)
        return LogWeights(
            log_likelihood=likelihood.by_row(draws.s).numpy(),
            log_prior=self._in_local_mode(lambda: log_prior(self.prior, draws)).numpy(),
            log_q=None if draws.log_q is None else draws.log_q.numpy(),
            scale=1.0 if num_data is None else num_data / likelihood.num_data,
        )

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

    def describe(self) -> str:
        """Guide and prior in two words."""
        return f"{self.guide.options().get('class', type(self.guide).__name__)}, {self.prior}"

    def log_likelihood(self, data: Any, *, batch_size: int = 16, need_target: bool = True) -> LogLikelihood:
        """Log p(y | s) of all rows as a differentiable function of s (D,), nats: where inference of your own starts.

        Args:
            data: rows with answers.
            batch_size: rows a pass.
            need_target: whether each row must have an answer.
        """
        examples = encode(read_rows(data), self.task.encode, need_target=need_target)
        return LogLikelihood(self.llm(), self.task, examples, batch_size=batch_size)

    def _in_local_mode(self, function: Callable[[], Result]) -> Result:
        """Run a function of guide or prior without touching Pyro's global store."""
        with torch.no_grad(), local_params():
            return function()

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
        """Write safetensors and JSON to the directory ``path``; see :mod:`scalabl_pyro.serialization`."""
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
