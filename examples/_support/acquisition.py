"""Chooses the rows to label next: scores of a prediction, and a pool that knows which rows have a label."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scalabl_pyro import Prediction

STRATEGIES = ("bald", "entropy", "random")


def scores(strategy: str, prediction: Prediction) -> NDArray[np.floating]:
    """Score how useful the label of each row would be.

    Args:
        strategy: ``"bald"``, the mutual information of answer and draw, H[E p] - E H[p] (Houlsby et al., 2011);
            ``"entropy"``, H[E p]; or ``"random"``, the same score for all rows.
        prediction: Prediction of N rows.

    Returns:
        (N,) scores in nats. Higher means more useful.

    Raises:
        ValueError: The strategy is unknown, or BALD is asked of a single draw, where it is 0 for every row.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown: use {', '.join(STRATEGIES)}.")
    if strategy == "random":
        return np.zeros(prediction.log_probs.shape[1])
    if strategy == "entropy":
        return prediction.total
    if prediction.num_draws < 2:
        raise ValueError(
            f"BALD compares draws, but num_draws={prediction.num_draws}: predict with num_draws=2 or more."
        )
    return prediction.epistemic


class Pool:
    """Rows with and without a label, by position.

    Args:
        size: N, number of all rows.
        labeled: Positions whose label is known from the start.

    Raises:
        ValueError: Positions repeat or lie outside the pool.
    """

    def __init__(self, size: int, labeled: Sequence[int]) -> None:
        if len(set(labeled)) != len(labeled) or not all(0 <= i < size for i in labeled):
            raise ValueError(f"labeled={list(labeled)} must be different positions from 0 to {size - 1}.")
        self.size = size
        self.labeled = [int(i) for i in labeled]

    @property
    def unlabeled(self) -> NDArray[np.integer]:
        """Positions without a label, in ascending order."""
        return np.setdiff1d(np.arange(self.size), self.labeled)

    def acquire(self, wanted: NDArray[np.floating], count: int, rng: np.random.Generator) -> list[int]:
        """Label the unlabeled rows with the highest scores.

        Args:
            wanted: (N,) scores of all rows. The scores of labeled rows are ignored.
            count: Number of rows to label. Fewer are labeled if fewer are left.
            rng: Generator that breaks ties.

        Returns:
            Positions of the new labels, highest score first.

        Raises:
            ValueError: The scores have another length, the score of an unlabeled row is NaN, or count is below 1.
        """
        wanted, rows = np.asarray(wanted), self.unlabeled
        if wanted.shape != (self.size,):
            raise ValueError(f"The scores have shape {wanted.shape}: expected ({self.size},), one per row of the pool.")
        if count < 1:
            raise ValueError(f"count={count}: acquire one row or more.")
        if np.isnan(wanted[rows]).any():
            raise ValueError(f"Scores of rows {rows[np.isnan(wanted[rows])].tolist()} are NaN: they cannot be ranked.")
        order = np.lexsort((rng.permutation(len(rows)), -wanted[rows]))
        acquired = [int(i) for i in rows[order[:count]]]
        self.labeled += acquired
        return acquired
