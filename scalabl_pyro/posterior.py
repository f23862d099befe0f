"""What training leaves: a frozen posterior that draws, predicts, saves itself and speaks to ArviZ."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from . import arviz_io, serialization
from ._rng import scoped_seed
from ._version import __version__
from .adapted import AdaptedLLM
from .data import encode, read_rows
from .guides import Guide
from .likelihoods import Task
from .lora import Adapter, Factors
from .model import BayesianLoRA
from .predictive import NumericPrediction, Prediction, predict
from .priors import Prior
from .subspace import Subspace


@dataclass(frozen=True)
class Draws:
    """S posterior draws on the CPU; draw i is the same vector whatever S is.

    Attributes:
        sites: latent site -> (S, ...); ``"s"`` is (S, D).
        seed: that gives them again.
        is_mean: whether the only draw is the posterior mean.
    """

    sites: Mapping[str, Tensor]
    seed: int = 0
    is_mean: bool = False

    @property
    def s(self) -> Tensor:
        """(S, D)."""
        return self.sites["s"]

    def __len__(self) -> int:
        return len(self.s)


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
        return BayesianLoRA(self.adapter, prior=self.prior)

    def mean(self) -> Tensor:
        """(D,) posterior mean of s."""
        with torch.no_grad(), pyro.settings.context(module_local_params=True):
            return self.guide.mean()["s"].detach().clone()

    def sample(self, num_draws: int, *, seed: int = 0) -> Draws:
        """Draw from the posterior; 0 draws give its mean as the only one.

        Draws are made one by one on the CPU, so that draw i depends on the seed alone: not on how many are asked
        for, nor on the device of the LLM.

        Raises:
            ValueError: a negative number of draws.
        """
        if num_draws < 0:
            raise ValueError(f"num_draws={num_draws} must be 0 (the posterior mean) or more.")
        with torch.no_grad(), pyro.settings.context(module_local_params=True):
            if num_draws == 0:
                sites = {k: v.detach().clone().unsqueeze(0) for k, v in self.guide.mean().items()}
                return Draws(sites, seed=seed, is_mean=True)
            with scoped_seed(seed), pyro.validation_enabled(False):
                traces = [poutine.trace(self.guide).get_trace() for _ in range(num_draws)]
        nodes: list[Any] = [trace.nodes for trace in traces]
        names = [n for n in traces[0].stochastic_nodes if not nodes[0][n]["infer"].get("is_auxiliary")]
        return Draws({n: torch.stack([node[n]["value"].detach() for node in nodes]) for n in names}, seed=seed)

    def predict(
        self,
        data: Any,
        *,
        num_draws: int = 10,
        seed: int = 0,
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
            batch_size: rows of data a pass.
            draws_per_pass: draws a pass at most; default all, halved when memory runs out.
            progress: show a progress bar.

        Returns:
            :class:`~scalabl_pyro.predictive.Prediction` for classes, else
            :class:`~scalabl_pyro.predictive.NumericPrediction`.
        """
        for name, number in {"batch_size": batch_size, "draws_per_pass": draws_per_pass or 1}.items():
            if number < 1:
                raise ValueError(f"{name}={number} must be positive.")
        draws = self.sample(num_draws, seed=seed)
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
        s = self.mean() if index is None else self.sample(index + 1, seed=seed).s[index]
        llm = self.llm()
        with self.adapter.bind(s, factors=llm.factors, heads=llm.heads):
            yield self.adapter.module

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
        sites = {k: v.numpy() for k, v in self.sample(num_draws, seed=seed).sites.items()}
        groups = {"posterior": arviz_io.posterior_group(sites, self.subspace)}
        if prediction is not None:
            groups["posterior_predictive"] = arviz_io.per_row_group("label", _replicate(prediction, seed))
            if prediction.target is not None:
                groups["log_likelihood"] = arviz_io.per_row_group("label", prediction.log_likelihood)
                groups["observed_data"] = arviz_io.observed_group("label", prediction.target)
        attrs = {
            "inference_library": "scalabl_pyro",
            "inference_library_version": __version__,
            "inference_method": "SVI",
            "guide": self.guide.options().get("class", type(self.guide).__name__),
            "sampling_seed": seed,
            **{
                k: int(v) if isinstance(v, bool) else v
                for k, v in self.provenance.items()
                if isinstance(v, str | int | float)
            },
        }
        return arviz_io.to_arviz(groups, attrs)

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


def _replicate(prediction: Prediction | NumericPrediction, seed: int) -> np.ndarray:
    """One simulated answer a draw and row, (S, N)."""
    if isinstance(prediction, NumericPrediction):
        return prediction.replicates
    gumbel = np.random.default_rng(seed).gumbel(size=prediction.log_probs.shape)  # Gumbel-max trick
    return (prediction.log_probs + gumbel).argmax(-1)
