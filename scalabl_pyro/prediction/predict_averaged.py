"""Prediction that keeps averages over draws only, so that its memory does not grow with the number of draws."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batch import Batch, Example
from ..distributed.processes import collective, current_processes
from ..lora.forward import AdaptedLLM
from ..tasks import Task
from .answered import join_targets
from .averaged import AveragedNumericPrediction, AveragedPrediction
from .averages import ClassAverages, Kept, NumberAverages
from .collect import Collector
from .predict import MANY_DRAWS, DrawOutputs, passes_over, shared_outputs


@collective
@torch.no_grad()
def predict_averaged(
    llm: AdaptedLLM,
    task: Task,
    parts: Iterable[Tensor],
    examples: Sequence[Example],
    *,
    num_draws: int,
    batch_size: int = 16,
    draws_per_pass: int = MANY_DRAWS,
    cache_prefix: bool = False,
    progress: bool = False,
) -> AveragedPrediction | AveragedNumericPrediction:
    """Predict every example under every draw, and keep averages over draws only.

    All batches run under the draws of one part before the next part is drawn. So the memory holds the draws of one
    part, the outputs of one batch under these, and a few numbers per row and class.

    Args:
        llm: LLM with the factors of a posterior.
        task: Task that defines the likelihood.
        parts: Draws, (P, D) per part.
        examples: Tokenized rows.
        num_draws: Number S of draws in all parts; 0 for the posterior mean as the only draw.
        batch_size: Number of rows per forward pass.
        draws_per_pass: Largest number of draws per forward pass; halved when memory runs out.
        cache_prefix: Whether to keep the hidden states at the first adapted block for all parts, and for later
            predictions of the same rows.
        progress: Whether to show a progress bar.

    Returns:
        Averages of N rows over S draws.

    Raises:
        ValueError: If a number is not a whole number from 1 on, or if a token has no embedding.
        FloatingPointError: If an output of the LLM is NaN.

    Example:
        >>> averaged = predict_averaged(posterior.llm(), posterior.task, [s[:2], s[2:]], examples, num_draws=len(s))
    """
    start = time.perf_counter()
    passes = passes_over(examples, task, llm, batch_size=batch_size, cache_prefix=cache_prefix)
    outputs_of = DrawOutputs(llm, task, size=draws_per_pass)
    averages = _Averages(task, examples)
    joint = current_processes()
    with tqdm(total=max(num_draws, 1), disable=not progress, desc="predict", unit="draw") as bar:
        for part in parts:
            s = part.to(passes.device)
            if joint.are_several:
                for batch, outputs in shared_outputs(joint, passes, outputs_of, s, progress=False):
                    averages.add(batch, outputs)
            else:
                passes.map(lambda batch, s=s: averages.add(batch, outputs_of(batch, s)))
            bar.update(len(s))
    return averages.as_prediction(num_draws, seconds=time.perf_counter() - start)


class _Averages:
    """Averages over draws of N rows, of classes or of numbers, as the first outputs tell.

    Args:
        task: Task that defines the likelihood.
        examples: Tokenized rows, which may lack an answer.
    """

    def __init__(self, task: Task, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.collect = Collector(task, examples, seed=None)
        self.found: ClassAverages | NumberAverages | None = None

    def add(self, batch: Batch, outputs: Tensor) -> None:
        """Add the outputs (P, B, K) of B rows under P more draws."""
        index, parts = self.collect(batch, outputs)
        kept: Kept = {name: value.numpy() for name, value in parts.items()}
        if self.found is None:
            self.found = self._start(kept)
        self.found.add(index.numpy(), kept)

    def _start(self, kept: Kept) -> ClassAverages | NumberAverages:
        if "log_odds" in kept:
            raise TypeError(
                f"keep_draws=False keeps averages of classes and numbers, and {type(self.collect.task).__name__} has "
                "several labels per row: predict with keep_draws=True."
            )
        if "log_probs" not in kept:
            return NumberAverages(len(self.examples), are_answered="log_density" in kept)
        target = join_targets([e.target for e in self.examples], are_classes=True)
        return ClassAverages(target, len(self.examples), kept["log_probs"].shape[-1])

    def as_prediction(self, num_draws: int, *, seconds: float) -> AveragedPrediction | AveragedNumericPrediction:
        """Make the result of what was added."""
        if self.found is None:
            raise ValueError("No draw was given, so there is nothing to average.")
        arrays: dict[str, Any] = {"log_mixture": None, **self.found.over(max(num_draws, 1))}
        target = join_targets([e.target for e in self.examples], are_classes=isinstance(self.found, ClassAverages))
        if isinstance(self.found, NumberAverages):
            return AveragedNumericPrediction(target=target, num_draws=num_draws, seconds=seconds, **arrays)
        return AveragedPrediction(
            target=target, classes=self.collect.classes, num_draws=num_draws, seconds=seconds, **arrays
        )
