"""From the outputs of an LLM to a prediction: the likelihood of each batch, and the rows back in their order."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .._process.random_state import Stream, derive_seed
from ..data.batch import Batch, Example, collate_targets
from ..data.labels import ClassName
from ..model.passes import Passes
from ..tasks import Task, at_least_float32
from .answered import join_targets
from .label_sets import LabelSetPrediction, join_label_sets
from .result import NumericPrediction, Prediction

Part = tuple[Tensor, dict[str, Tensor]]
"""Positions of the rows of a batch in the data set, and what is kept of their likelihood."""


@torch.no_grad()
def predict_batches(
    passes: Passes,
    outputs_of: Callable[[Batch], Tensor],
    task: Task,
    examples: Sequence[Example],
    *,
    seed: int,
    is_mean: bool = False,
    progress: bool = False,
) -> Any:
    """Predict all rows from a function that gives the outputs of a batch.

    Args:
        passes: Batches of the rows, and the LLM that runs over them.
        outputs_of: Function from a batch on the device to outputs (S, B, K).
        task: Task that defines the likelihood.
        examples: Tokenized rows.
        seed: Seed of the simulated answers of a likelihood over numbers.
        is_mean: Whether the only draw is the posterior mean.
        progress: Whether to show a progress bar.

    Raises:
        FloatingPointError: If an output is NaN.
    """
    start = time.perf_counter()
    collect = Collector(task, examples, seed=seed)
    parts = passes.map(lambda batch: collect(batch, outputs_of(batch)), progress=progress)
    return _as_prediction(parts, collect, examples, is_mean=is_mean, seconds=time.perf_counter() - start)


@torch.no_grad()
def predict_from_outputs(
    task: Task,
    examples: Sequence[Example],
    outputs: Sequence[tuple[Batch, Tensor]],
    *,
    seed: int = 0,
    is_mean: bool = False,
    seconds: float = float("nan"),
) -> Any:
    """Predict all rows from outputs that were computed elsewhere.

    Args:
        task: Task that defines the likelihood.
        examples: Tokenized rows.
        outputs: Batches, each with its outputs (S, B, K).
        seed: Seed of the simulated answers of a likelihood over numbers.
        is_mean: Whether the only draw is the posterior mean.
        seconds: Time that the outputs took.

    Raises:
        FloatingPointError: If an output is NaN.
    """
    collect = Collector(task, examples, seed=seed)
    parts = [collect(batch, draws) for batch, draws in outputs]
    return _as_prediction(parts, collect, examples, is_mean=is_mean, seconds=seconds)


class Collector:
    """Keeps what a prediction needs of the likelihood of each batch.

    Args:
        task: Task that defines the likelihood.
        examples: Tokenized rows, which may lack an answer.
        seed: Seed of the simulated answers; None for no answers.
    """

    def __init__(self, task: Task, examples: Sequence[Example], *, seed: int | None) -> None:
        task.check_use("A prediction")
        self.task = task
        self.examples = examples
        #: Names of the classes that rows use, once outputs were seen.
        self.classes: tuple[ClassName, ...] = ()
        self.targets = [e.target for e in examples]
        known = [target for target in self.targets if target is not None]
        self.are_all_known = len(known) == len(self.targets)
        # A row without an answer is scored as if it had the first known one, which the likelihood allows. This score
        # is overwritten by NaN.
        self.filled = collate_targets([known[0] if t is None else t for t in self.targets]) if known else None
        # The draws of s come from the plain seed: with the same random numbers the answers would follow them.
        self.is_normal = False
        self.noise = None if seed is None else Stream(derive_seed(seed, "answers"))

    def __call__(self, batch: Batch, outputs: Tensor) -> Part:
        """Log probabilities, or moments, given ``outputs`` (S, B, K): each (S, B, ...), on the CPU."""
        _check_outputs(batch, outputs)
        if not self.are_all_known:
            batch = batch.without_target()
        d: Any = self.task.distribution(outputs.to(batch.index.device), batch)
        if isinstance(d, dist.Categorical):
            log_probs = at_least_float32(d.logits).log_softmax(-1)
            if not self.classes:
                self.classes = used_classes(self.task, self.examples, log_probs.shape[-1])
            kept = {"log_probs": log_probs[..., : len(self.classes)]}  # a prompt may have up to 26 choices
        elif is_label_sets(d):
            self.classes = tuple(self.task.classes or range(d.event_shape[0]))
            kept = {"log_odds": at_least_float32(d.base_dist.logits), **self._densities(d, batch)}
        else:
            self.is_normal = isinstance(d, torch.distributions.Normal)
            kept = {"means": d.mean, "variances": d.variance}
            if self.noise is not None:
                with self.noise.use():
                    kept["replicates"] = d.sample()
            kept |= self._densities(d, batch)
        shape = (len(outputs), len(batch))
        return batch.index.cpu(), {k: v.expand(*shape, *v.shape[2:]).cpu() for k, v in kept.items()}

    def _densities(self, d: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the log density of the targets, NaN where a row has none; nothing if no row has one."""
        if self.filled is None:
            return {}
        own = batch.index.cpu()
        unknown = torch.tensor([self.targets[i] is None for i in own.tolist()], device=batch.index.device)
        return {"log_density": d.log_prob(self.filled[own].to(batch.index.device)).masked_fill(unknown, torch.nan)}


def is_label_sets(d: Any) -> bool:
    """Whether a distribution is that of any number of labels per row: independent Bernoulli distributions.

    Example:
        >>> is_label_sets(dist.Bernoulli(torch.ones(2, 3)).to_event(1))
        True
    """
    base = getattr(d, "base_dist", None)
    return isinstance(base, torch.distributions.Bernoulli) and len(d.event_shape) == 1


def _check_outputs(batch: Batch, outputs: Tensor) -> None:
    missing = torch.isnan(outputs)
    if missing.any():
        bad = missing.reshape(*outputs.shape[:2], -1).any(2).any(0).cpu()
        raise FloatingPointError(
            f"The LLM's outputs of rows {batch.index.cpu()[bad].tolist()} are NaN. Check these inputs, and use "
            "bfloat16 or float32 instead of float16."
        )


def _as_prediction(
    parts: Sequence[Part], collect: Collector, examples: Sequence[Example], *, is_mean: bool, seconds: float
) -> Prediction | NumericPrediction | LabelSetPrediction:
    """Join what was kept of each batch, rows back in the order of the data."""
    order = torch.cat([index for index, _ in parts]).argsort()
    kept = {k: torch.cat([part[k] for _, part in parts], dim=1)[:, order].numpy() for k in parts[0][1]}
    arrays: dict[str, Any] = dict(kept)
    if "log_odds" in arrays:
        arrays.setdefault("log_density", None)
        labels = join_label_sets([e.target for e in examples], len(collect.classes))
        return LabelSetPrediction(target=labels, classes=collect.classes, is_mean=is_mean, seconds=seconds, **arrays)
    target = join_targets([e.target for e in examples], are_classes="log_probs" in kept)
    if "log_probs" not in arrays:
        arrays.setdefault("log_density", None)
        arrays["is_normal"] = collect.is_normal
        return NumericPrediction(target=target, is_mean=is_mean, seconds=seconds, **arrays)
    return Prediction(arrays["log_probs"], target, collect.classes, is_mean=is_mean, seconds=seconds)


def used_classes(task: Task, examples: Sequence[Example], num_outputs: int) -> tuple[ClassName, ...]:
    """Return the names of the classes that rows use, without choices that no row has.

    Args:
        task: Task that defines the likelihood.
        examples: Tokenized rows.
        num_outputs: Number of classes of the likelihood.
    """
    classes = task.classes or tuple(str(c) for c in range(num_outputs))
    used = max((e.extras.get("num_choices", len(classes)) for e in examples), default=len(classes))
    return tuple(classes[:used])
