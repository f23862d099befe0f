"""The methods of the quality benchmark: each adapts the same LLM, is trained on the same budget, and restores the LLM.

All methods share steps, batches, rank and targets. The other options of a method have the defaults of the library,
except those in ``EXTRAS``. ``--set`` and ``--variant`` change them.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

import scalabl_pyro as sp
from scalabl_pyro import baselines
from scalabl_pyro.guides import DeltaGuide
from scalabl_pyro.lora.attach import find_adapter

from .data import DataSet, FixedWidthBatches

#: Options of the adapter, and options of predictions. All others are options of the method.
LORA = {"gauge", "lora_alpha", "lora_dropout", "layers_to_transform", "prior", "r", "target_modules"}
PREDICT = {"design", "num_draws"}
#: Options whose default in the benchmark differs from that of the library.
EXTRAS: dict[str, dict[str, Any]] = {
    "blob": {"kl_weight": "paper"},  # The schedule of its paper: with weight 1 the KL outweighs a small data set.
    "scalabl_released": {"lr": 1e-3},  # The default is that of its paper, which trains 12 times as long.
}
#: Methods that start from the result of another method, and that method.
BASES = {"tfb": "mle", "laplace_lora": "map"}
TRAINED = ("mle", "map", "mc_dropout", "ensemble", "blob", "scalabl", "scalabl_released")
METHODS = ("mle", "tfb", "map", "laplace_lora", "mc_dropout", "ensemble", "blob", "scalabl", "scalabl_released")


@dataclass(frozen=True)
class Method:
    """A method, or a variant of a method: one line of the report.

    Attributes:
        name: Name of the line.
        kind: One of ``METHODS``.
        options: Options beside the shared budget.
    """

    name: str
    kind: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """Budget that all methods share.

    Attributes:
        num_steps: Optimizer steps per training.
        batch_size: Rows per step.
        lr: Learning rate of methods that have no ``lr`` option of their own. None: the default of each method.
        rank: Rank r of LoRA.
        lora_alpha: Scale of LoRA, gamma = lora_alpha / r.
        target_modules: Names of the adapted layers.
        num_draws: Draws per prediction.
        num_widths: Number of widths that prompts are padded to.
    """

    num_steps: int = 400
    batch_size: int = 16
    lr: float | None = None
    rank: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "lm_head")
    num_draws: int = 10
    num_widths: int = 3


@dataclass(frozen=True)
class Learned:
    """Result of a training.

    Attributes:
        posterior: Object with a ``predict`` method.
        seconds: Duration of the training.
        peak: Peak GPU memory in bytes; None on a CPU.
        predict: Options of predictions.
    """

    posterior: Any
    seconds: float
    peak: int | None
    predict: Mapping[str, Any]


class Workbench:
    """One LLM in memory, adapted by one method at a time.

    A point posterior is kept until another training begins, so that methods that start from it need not train it again.
    Its cost is included in theirs.

    Args:
        llm: Base model.
        budget: Budget of all methods.
        predict_batch: Rows per forward pass of predictions.
    """

    def __init__(self, llm: nn.Module, budget: Budget, *, predict_batch: int = 16) -> None:
        self.llm = llm
        self.budget = budget
        self.predict_batch = predict_batch
        self._held: tuple[str, Learned] | None = None

    def learn(self, method: Method, data: DataSet, seed: int) -> Learned:
        """Train a method on a data set.

        Args:
            method: Method to train.
            data: Data set.
            seed: Seed of the training.
        """
        options = dict(method.options)
        predict = {name: options.pop(name) for name in PREDICT & set(options)}
        if method.kind in BASES:
            base = self._train(BASES[method.kind], options.pop("base", {}), data, seed)
            learned = self._measured(lambda: self._from_base(method.kind, base.posterior, options, data, seed))
            seconds = base.seconds + learned.seconds
            peak = None if base.peak is None or learned.peak is None else max(base.peak, learned.peak)
            return Learned(learned.posterior, seconds, peak, predict)
        learned = self._train(method.kind, options, data, seed)
        return Learned(learned.posterior, learned.seconds, learned.peak, predict)

    def predict(self, learned: Learned, rows: Any, *, seed: int) -> sp.prediction.predict.Prediction:
        """Predict rows with the draws of a posterior."""
        draws = 0 if is_point(learned.posterior) else self.budget.num_draws
        options = {"num_draws": draws, "batch_size": self._predict_batch(learned.posterior), **learned.predict}
        return learned.posterior.predict(rows, seed=seed, **options)

    def _predict_batch(self, posterior: Any) -> int:
        """Rows per pass. Linearized predictions need a backward pass, and so more memory per row."""
        noise = getattr(posterior, "noise", None)
        return min(self.predict_batch, 32) if getattr(noise, "linearized", False) else self.predict_batch

    def clear(self) -> None:
        """Restore the base model, and free memory."""
        self._held = None
        if (adapter := find_adapter(self.llm)) is not None:
            adapter.unload()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _train(self, kind: str, options: Mapping[str, Any], data: DataSet, seed: int) -> Learned:
        key = json.dumps([kind, data.name, seed, options], sort_keys=True, default=str)
        if self._held is None or self._held[0] != key:
            self.clear()
            self._held = (key, self._measured(lambda: self._fit(kind, dict(options), data, seed)))
        return self._held[1]

    def _measured(self, train: Callable[[], Any]) -> Learned:
        on_gpu = next(self.llm.parameters()).device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        posterior = train()
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return Learned(posterior, time.perf_counter() - start, peak, {})

    def _fit(self, kind: str, options: dict[str, Any], data: DataSet, seed: int) -> Any:
        budget, num_data = self.budget, len(data.train)
        lora = {"r": budget.rank, "lora_alpha": budget.lora_alpha, "target_modules": list(budget.target_modules)}
        lora |= {"seed": seed} | {name: options.pop(name) for name in LORA & set(options)}
        if "prior" in lora:
            lora["prior"] = prior(lora["prior"])
        batches = FixedWidthBatches(data.train, data.task, budget.batch_size, num_widths=budget.num_widths)
        common = {"num_steps": budget.num_steps, "batch_size": budget.batch_size, "num_data": num_data, "seed": seed}
        shared = {} if budget.lr is None else {"lr": budget.lr}
        common |= {"progress": False} | EXTRAS.get(kind, {}) | shared | options
        if "kl_weight" in common:
            common["kl_weight"] = kl_weight(common["kl_weight"], num_data, common["batch_size"])
        if kind == "scalabl":
            refit = common.pop("laplace", None)
            posterior = sp.fit(sp.bayesian_lora(self.llm, **lora), data.task, batches, **common).posterior
            return posterior if refit is None else sp.laplace(posterior, data.train, **refit)
        if kind == "ensemble":
            common["seed"] = 1000 * seed  # Members have the seeds after it, so that no two runs share a member.
        function: Any = {"map": baselines.map_lora, "ensemble": baselines.deep_ensemble}.get(kind)
        function = getattr(baselines, kind) if function is None else function
        return function(self.llm, data.task, batches, lora=lora, **common).posterior

    def _from_base(self, kind: str, posterior: Any, options: Mapping[str, Any], data: DataSet, seed: int) -> Any:
        if kind == "tfb":
            own = {"num_draws": self.budget.num_draws, "batch_size": self.predict_batch, **options}
            return baselines.tfb(posterior, data.train, seed=seed, **own)
        return baselines.laplace_lora(posterior, data.train, seed=seed, **{"batch_size": 16, **options})


def prior(given: Any) -> Any:
    """Make a prior from JSON: a scale, a name, or ``{"loc": m, "scale": t}`` for a normal prior."""
    return dist.Normal(float(given["loc"]), float(given["scale"])) if isinstance(given, Mapping) else given


def kl_weight(given: Any, num_data: int, batch_size: int) -> Any:
    """Make the weight of the KL from JSON.

    Args:
        given: A number; ``"paper"``, the schedule of the BLoB paper; or ``{"to": w, "over": n}``, a linear rise from 0
            to w over n steps.
        num_data: Number of training rows.
        batch_size: Rows per step.
    """
    if given == "paper":
        return baselines.KLReweighting(num_data=num_data, batch_size=batch_size)
    if isinstance(given, Mapping):
        to, over = float(given["to"]), int(given["over"])
        return lambda step: to * min((step + 1) / over, 1.0)
    return given


def is_point(posterior: Any) -> bool:
    """Tell whether all draws of a posterior are the same."""
    return isinstance(posterior, sp.Posterior) and isinstance(posterior.guide, DeltaGuide)


def num_parameters(posterior: Any) -> dict[str, int]:
    """Count the parameters that predictions need beside the base model.

    Returns:
        ``"total"``, all of them; and ``"extra"``, those beside one A and one B per layer.
    """
    adapter = posterior.adapter
    lora = sum(A.numel() + B.numel() for A, B in adapter.factors())
    extra = 0
    if isinstance(posterior, baselines.EnsemblePosterior):
        extra = (len(posterior.members) - 1) * lora
    elif isinstance(posterior, baselines.FactorPosterior):
        tensors = posterior.noise.tensors().values()
        extra = sum(t.numel() for t in tensors) or (1 if isinstance(posterior.noise, baselines.SpectralNoise) else 0)
    elif not (is_point(posterior) and bool((posterior.mean() == 1).all())):  # s = 1 everywhere is plain LoRA.
        extra = sum(t.numel() for t in (*posterior.guide.parameters(), *posterior.guide.buffers()))
    return {"total": lora + extra, "extra": extra}
