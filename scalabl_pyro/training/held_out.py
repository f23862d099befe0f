"""Evaluations on held-out rows while a training runs: when they are due, which state is the best, when to stop."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .held_out_scores import NLL
from .training_state import LearnedState

#: Why a posterior holds the state of a step.
LAST_STEP = "the last step of the training; fit(patience=...) keeps the best one"
LOWEST = "the lowest held-out NLL of all evaluations"
NONE_FINITE = "the last step of the training, because no held-out NLL was finite"
NO_EVALUATION = "the last step of the training, which ended before the first evaluation"


class HeldOut:
    """Evaluates a training, and keeps the state with the lowest held-out NLL if the run has a patience.

    Args:
        score: Computes the scores of the present parameters, by column.
        columns: Names of the scores.
        every: Number of steps between two evaluations.
        num_steps: Number of steps of the run. The last one is always evaluated.
        patience: Number of evaluations in a row without a lower NLL after which the run ends. None: it does not end
            early, and no state is kept.

    Attributes:
        best_step: Step after which the kept state was copied, or None.
        best_nll: Lowest held-out NLL so far, nats per row.
    """

    def __init__(
        self,
        score: Callable[[], Mapping[str, float]],
        columns: tuple[str, ...],
        *,
        every: int,
        num_steps: int,
        patience: int | None,
    ) -> None:
        self.score = score
        self.columns = columns
        self.every = every
        self.num_steps = num_steps
        self.patience = patience
        self.best_step: int | None = None
        self.best_nll = math.inf
        self._best: dict[str, Tensor] = {}
        self._num_worse = 0
        self._evaluated = 0

    def is_due(self, num_taken: int) -> bool:
        """Tell whether the state after so many steps is to be evaluated, and was not."""
        is_time = num_taken % self.every == 0 or num_taken == self.num_steps
        return is_time and 0 < num_taken != self._evaluated

    @property
    def is_over(self) -> bool:
        """Whether the patience is used up, so that the run ends."""
        return self.patience is not None and self._num_worse >= self.patience

    def evaluate(self, row: dict[str, float], num_taken: int, learned: LearnedState) -> None:
        """Score the present state, write the scores into a row of the history, and keep the state if it is the best.

        Args:
            row: History row of the last step that changed the parameters.
            num_taken: Number of steps taken.
            learned: The present state.
        """
        row.update(self.score())
        self._evaluated = num_taken
        if self.patience is None:
            return
        if row[NLL] < self.best_nll:
            self.best_step, self.best_nll, self._num_worse = int(row["step"]), row[NLL], 0
            self._best = {name: tensor.detach().clone() for name, tensor in learned.modules().items()}
        else:
            self._num_worse += 1

    def restore(self, learned: LearnedState) -> None:
        """Put the best state back into the live tensors, if one was kept."""
        if self._best:
            learned.load(self._best)

    def kept(self, history: list[dict[str, float]]) -> tuple[int | None, str]:
        """Return the step whose state the posterior holds (None before the first step), and why it is this one."""
        if self.best_step is not None:
            return self.best_step, LOWEST
        last = int(history[-1]["step"]) if history else None
        if self.patience is None:
            return last, LAST_STEP
        return last, NONE_FINITE if self._evaluated else NO_EVALUATION

    def describe(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """Describe the evaluations for the provenance of a posterior."""
        step, why = self.kept(history)
        found = {"every": self.every, "patience": self.patience, "kept_step": step, "why": why}
        return found | {"nll": self.best_nll if self.best_step is not None else None, "stopped_early": self.is_over}

    def tensors(self) -> dict[str, Tensor]:
        """Give the tensors of the best state, for a checkpoint."""
        return dict(self._best)

    def record(self) -> dict[str, Any]:
        """Give the numbers that a checkpoint stores."""
        return {
            "best_step": self.best_step,
            "best_nll": None if self.best_step is None else self.best_nll,
            "num_worse": self._num_worse,
            "evaluated": self._evaluated,
        }

    def load_state(self, tensors: Mapping[str, Tensor], record: Any, learned: LearnedState) -> None:
        """Continue from the tensors and numbers of a checkpoint.

        Args:
            tensors: Tensors of the best state.
            record: What :meth:`record` gave.
            learned: The state, which knows names and shapes.

        Raises:
            ValueError: They are not those of a run with these evaluations.
        """
        if not isinstance(record, dict) or set(record) != set(self.record()):
            raise ValueError("it does not say what the evaluations on held-out rows have found")
        counts = (record["num_worse"], record["evaluated"])
        is_count = all(type(value) is int and 0 <= value <= self.num_steps for value in counts)
        step, nll = record["best_step"], record["best_nll"]
        has_best = type(step) is int and 0 <= step < self.num_steps and type(nll) is float and math.isfinite(nll)
        if not is_count or not (has_best or (step is None and nll is None)) or bool(tensors) != has_best:
            raise ValueError("what it says of the evaluations on held-out rows is no result of a run")
        if tensors:
            learned.check(tensors)
        self._best = {name: tensor.clone() for name, tensor in tensors.items()}
        self.best_step, self.best_nll = step, nll if has_best else math.inf
        self._num_worse, self._evaluated = counts
