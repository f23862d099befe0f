"""Scores of probabilities: accuracy, negative log likelihood, Brier score, and entropy."""

import numpy as np
import torch

from .._arguments import known_arguments
from .._probabilities import as_probabilities, check_probabilities
from .arrays import Array, Labels


@known_arguments
def accuracy(probs: Array, labels: Labels) -> float:
    """Compute the share of rows whose most probable class is the label; higher is better."""
    from torchmetrics.functional.classification import multiclass_accuracy

    probs, labels = as_probabilities(probs, labels)
    p, y = torch.as_tensor(probs), torch.as_tensor(labels)
    return multiclass_accuracy(p.argmax(1), y, num_classes=p.shape[1], average="micro").item()


@known_arguments
def nll(probs: Array, labels: Labels) -> float:
    """Compute the mean negative log probability of the label, nats; lower is better.

    It is infinite where a label has probability 0. A probability below about 1e-308 is 0 as a float:
    ``prediction.metrics()`` computes the NLL from log probabilities, which have no such limit.
    """
    probs, labels = as_probabilities(probs, labels)
    with np.errstate(divide="ignore"):
        return mean_nll(np.log(probs[np.arange(len(labels)), labels].astype(np.float64)))


@known_arguments
def brier(probs: Array, labels: Labels) -> float:
    """Compute the mean squared distance to the one-hot label: 0 is best, 2 is worst (Brier, 1950)."""
    probs, labels = as_probabilities(probs, labels)
    onehot = np.eye(probs.shape[1])[labels]
    return float(((probs - onehot) ** 2).sum(1).mean())


@known_arguments
def entropy(probs: Array) -> Array:
    """Compute the entropy of each row, (N,), nats; probabilities (..., N, C) give (..., N)."""
    probs = np.asarray(probs)
    check_probabilities(probs)
    safe = np.where(probs > 0, probs, 1.0)
    return -(probs * np.log(safe)).sum(-1)


def mean_nll(log_likelihood: Array) -> float:
    """Compute the mean negative log likelihood of log likelihoods (N,), nats."""
    return float(0.0 - np.asarray(log_likelihood, dtype=np.float64).mean())
