"""Which rows to have labeled next: scores of a prediction, and the books of a pool."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scalabl_pyro import Prediction

STRATEGIES = ("bald", "entropy", "random")


def scores(strategy: str, prediction: Prediction) -> NDArray[np.floating]:
    """(N,) how much each row is wanted, higher = more.

    ``bald`` is the mutual information of answer and draw, H[E p] - E H[p] (Houlsby et al., 2011); ``entropy`` is
    H[E p]; ``random`` wants all rows alike. Nats.

    Raises:
        ValueError: an unknown strategy, or BALD of a single function, for which it is 0 everywhere.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown: use {', '.join(STRATEGIES)}.")
    if strategy == "random":
        return np.zeros(prediction.log_probs.shape[1])
    if strategy == "entropy":
        return prediction.total
    if prediction.num_draws < 2:
        raise ValueError(
            f"BALD compares draws, but there are {prediction.num_draws}: predict with num_draws=2 or more."
        )
    return prediction.epistemic


class Pool:
    """Rows with and without a label, by position.

    Args:
        size: N, all rows.
        labeled: positions whose label is known from the start.

    Raises:
        ValueError: positions that repeat or lie outside of the pool.
    """

    def __init__(self, size: int, labeled: Sequence[int]) -> None:
        if len(set(labeled)) != len(labeled) or not all(0 <= i < size for i in labeled):
            raise ValueError(f"labeled={list(labeled)} must be different positions from 0 to {size - 1}.")
        self.size = size
        self.labeled = [int(i) for i in labeled]

    @property
    def unlabeled(self) -> NDArray[np.integer]:
        """Positions without a label, in order."""
        return np.setdiff1d(np.arange(self.size), self.labeled)

    def acquire(self, wanted: NDArray[np.floating], count: int, rng: np.random.Generator) -> list[int]:
        """Label the ``count`` unlabeled rows that are wanted most, or all that are left; ties at random.

        Args:
            wanted: (N,) scores of all rows; those of labeled rows are not looked at.
            count: rows to acquire.
            rng: breaks ties.

        Returns:
            Positions acquired, most wanted first.

        Raises:
            ValueError: scores of another length, a NaN among those looked at, or no rows asked for.
        """
        wanted, rows = np.asarray(wanted), self.unlabeled
        if wanted.shape != (self.size,):
            raise ValueError(f"The scores have shape {wanted.shape}: expected ({self.size},), one a row of the pool.")
        if count < 1:
            raise ValueError(f"count={count}: acquire one row or more.")
        if np.isnan(wanted[rows]).any():
            raise ValueError(f"Scores of rows {rows[np.isnan(wanted[rows])].tolist()} are NaN: they cannot be ranked.")
        order = np.lexsort((rng.permutation(len(rows)), -wanted[rows]))
        acquired = [int(i) for i in rows[order[:count]]]
        self.labeled += acquired
        return acquired
