"""Averages over draws that come in parts, in float64: sums, variances and log mixtures of each row."""

import numpy as np
from scipy.special import logsumexp

from .. import metrics
from ..metrics import Array
from .answered import log_prob_of

Kept = dict[str, Array]
"""What is kept of the likelihood of B rows under P draws: arrays (P, B, ...) by name."""


class ClassAverages:
    """Averages over draws of the class probabilities of N rows.

    Args:
        target: (N,) class indices, -1 where a row has no answer; None if no row has one.
        num_rows: Number N of rows.
        num_classes: Number C of classes.
    """

    def __init__(self, target: Array | None, num_rows: int, num_classes: int) -> None:
        self.target = target
        self.probs = np.zeros((num_rows, num_classes))
        self.aleatoric = np.zeros(num_rows)
        self.log_mixture = None if target is None else np.full(num_rows, -np.inf)

    def add(self, rows: Array, kept: Kept) -> None:
        """Add the log probabilities (P, B, C) of the rows with indices (B,) under P more draws."""
        log_probs = kept["log_probs"]
        probs = np.exp(log_probs, dtype=np.float64)
        self.probs[rows] += probs.sum(0)
        self.aleatoric[rows] += metrics.entropy(probs).sum(0)
        if self.log_mixture is not None and self.target is not None and (self.target[rows] >= 0).any():
            _add_densities(self.log_mixture, rows, log_prob_of(log_probs, self.target[rows]))

    def over(self, num_draws: int) -> Kept:
        """Divide by the number of draws, which must be those that were added."""
        averages = {"probs": self.probs / num_draws, "aleatoric": self.aleatoric / num_draws}
        if self.log_mixture is None or self.target is None:
            return averages
        is_known = self.target >= 0
        return {**averages, "log_mixture": np.where(is_known, self.log_mixture - np.log(num_draws), np.nan)}


class NumberAverages:
    """Averages over draws of the means, variances and densities of N rows.

    The variance of the means is joined from those of the parts (Chan, Golub and LeVeque, 1983), so that it has no
    difference of large numbers.

    Args:
        num_rows: Number N of rows.
        are_answered: Whether the likelihood gives densities of targets.
    """

    def __init__(self, num_rows: int, *, are_answered: bool) -> None:
        self.count = np.zeros(num_rows)
        self.mean = np.zeros(num_rows)
        self.squares = np.zeros(num_rows)
        self.aleatoric = np.zeros(num_rows)
        self.log_mixture = np.full(num_rows, -np.inf) if are_answered else None

    def add(self, rows: Array, kept: Kept) -> None:
        """Add the moments (P, B) of the rows with indices (B,) under P more draws."""
        means = np.asarray(kept["means"], dtype=np.float64)
        before, now = self.count[rows], len(means)
        shift = means.mean(0) - self.mean[rows]
        self.count[rows] += now
        self.mean[rows] += shift * (now / (before + now))
        self.squares[rows] += now * means.var(0) + shift**2 * (before * now / (before + now))
        self.aleatoric[rows] += np.asarray(kept["variances"], dtype=np.float64).sum(0)
        if self.log_mixture is not None:
            _add_densities(self.log_mixture, rows, kept["log_density"])

    def over(self, num_draws: int) -> Kept:
        """Divide by the number of draws, which must be those that were added."""
        averages = {"mean": self.mean, "aleatoric": self.aleatoric / num_draws, "epistemic": self.squares / num_draws}
        if self.log_mixture is not None:
            averages["log_mixture"] = self.log_mixture - np.log(num_draws)
        return averages


def _add_densities(total: Array, rows: Array, log_densities: Array) -> None:
    """Add log densities (P, B) of P draws to the log of their sum (N,) so far."""
    with np.errstate(invalid="ignore"):  # NaN where a row has no answer
        total[rows] = np.logaddexp(total[rows], logsumexp(np.asarray(log_densities, dtype=np.float64), axis=0))
