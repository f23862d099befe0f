"""Predictions and metrics of a Trainer under draws from the posterior."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from transformers import EvalPrediction

from ... import metrics
from ...data.batch import Batch
from ...lora.token_log_probs import NO_TOKEN
from ...prediction.predict import DrawOutputs
from ...tasks import Task, at_least_float32


class Answers(NamedTuple):
    """What the draws together say of a batch.

    Attributes:
        log_likelihood: (B,) log probability, or density, of the answers under the mixture of the draws, nats; None if
            the answers are not known.
        predictions: (B, C) log probabilities of the classes under the mixture. (B,) ``log_likelihood`` for completions.
            For numbers, (B,) means, and also ``log_likelihood`` if it is known.
    """

    log_likelihood: Tensor | None
    predictions: Tensor | tuple[Tensor, ...]


@torch.no_grad()
def answers_of(task: Task, outputs_of: DrawOutputs, batch: Batch, s: Tensor) -> Answers:
    """Predict a batch under draws, each of which is the same function on every batch.

    Args:
        task: The likelihood.
        outputs_of: Computes the outputs of the LLM.
        batch: B rows on the device.
        s: Draws, (S, D).
    """
    d: Any = task.distribution(outputs_of(batch, s), batch)
    if isinstance(d, dist.Categorical):
        mixture = _mean_of_draws(at_least_float32(d.logits).log_softmax(-1))
        return Answers(None if batch.target is None else _at(mixture, batch.target), mixture)
    known = None if batch.target is None else _mean_of_draws(at_least_float32(d.log_prob(batch.target)))
    if task.scores_only:
        assert known is not None  # such a task has no outputs without answers
        return Answers(known, known)
    means = d.mean.mean(0)
    return Answers(known, means if known is None else (means, known))


class MetricsUnderDraws:
    """Computes the metrics of a task, and those of the user.

    Args:
        task: The likelihood.
        own: The user's ``compute_metrics``, or None.
    """

    def __init__(self, task: Task, own: Callable[[EvalPrediction], dict[str, Any]] | None) -> None:
        self.task = task
        self.own = own

    def __call__(self, predicted: EvalPrediction) -> dict[str, Any]:
        """Compute the metrics of all rows. ``loss`` is the NLL, nats per row."""
        values = scores(self.task, predicted.predictions, np.asarray(predicted.label_ids))
        return {"loss": values["nll"], **values, **(self.own(predicted) if self.own is not None else {})}


def scores(task: Task, predictions: Any, labels: np.ndarray) -> dict[str, float]:
    """Compute NLL (nats per row), and what else the kind of answer allows.

    Args:
        task: The likelihood.
        predictions: Predictions of all rows, see :class:`Answers`.
        labels: Answers: classes (N,), tokens (N, T), or numbers (N,).
    """
    if isinstance(predictions, tuple):
        means, log_density = predictions
        if labels.ndim > 1:  # several labels per row
            return {"nll": -float(log_density.mean()), "brier": float(((means - labels) ** 2).mean())}
        return {"nll": -float(log_density.mean()), "rmse": math.sqrt(float(((means - labels) ** 2).mean()))}
    if task.scores_only:
        total = -float(predictions.sum())
        return {"nll": total / len(predictions), "nll_per_token": total / max(int((labels != NO_TOKEN).sum()), 1)}
    log_probs = predictions.astype(np.float64)
    probs = np.exp(log_probs)
    probs /= probs.sum(1, keepdims=True)  # it was rounded to the type of the LLM's outputs
    return {
        "nll": -float(log_probs[np.arange(len(labels)), labels].mean()),
        "accuracy": metrics.accuracy(probs, labels),
        "ece": metrics.ece(probs, labels),
        "brier": metrics.brier(probs, labels),
    }


def _mean_of_draws(log_probs: Tensor) -> Tensor:
    """Average probabilities over draws, (S, ...) -> (...), in logarithms."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _at(log_probs: Tensor, target: Tensor) -> Tensor:
    return log_probs.gather(1, target[:, None])[:, 0]
