"""Detects steps that are not finite and recovers from them."""

import logging
from typing import Any

from torch import Tensor

from .messages import overflown
from .options import OnNonfinite
from .training_state import LearnedState

logger = logging.getLogger(__name__)

#: Number of rejected steps in a row after which training stops.
MAX_IN_A_ROW = 10
#: Number of steps between the copies that ``"restore"`` returns to. A second failure within it ends the training.
SNAPSHOT_EVERY = 50


class Recovery:
    """What to do after a step that is not finite. The step itself has changed no parameter.

    Args:
        policy: ``"raise"`` stops. ``"skip"`` leaves the step out. ``"restore"`` also returns to the parameters and the
            optimizer state of up to ``SNAPSHOT_EVERY`` steps ago, and continues with later batches and other noise, as
            Chowdhery et al. (PaLM, 2022, section 5.1) did by hand.
        learned: State that is copied and restored.

    Attributes:
        skipped: Number of steps left out.
    """

    def __init__(self, policy: OnNonfinite, learned: LearnedState) -> None:
        self.policy = policy
        self.learned = learned
        self.skipped = 0
        self._in_a_row = 0
        self._restored_at: int | None = None
        self._snapshot: dict[str, Tensor] | None = None
        self._snapshot_step = 0

    def accept(self) -> None:
        """Count a step that was finite."""
        self._in_a_row = 0

    def remember(self, step: int, *, now: bool = False) -> None:
        """Copy the state before ``step``, if the policy needs a copy and one is due (or ``now``)."""
        if self.policy != "restore":
            return
        is_due = now or self._snapshot is None or step - self._snapshot_step >= SNAPSHOT_EVERY
        if is_due and not overflown(self.learned.objective):  # a copy with infinite numbers would not help
            self._snapshot, self._snapshot_step = self.learned.snapshot(), step

    def reject(self, step: int, facts: str) -> str | None:
        """Handle a step that was not finite.

        Args:
            step: Number of the step.
            facts: Description of its batch.

        Returns:
            Why training must stop, as the end of a message; None to continue with the next step.
        """
        if self.policy == "raise":
            return ""
        self._in_a_row += 1
        if self.policy == "skip" and self._in_a_row >= MAX_IN_A_ROW:
            return f" {self._in_a_row} steps in a row were not finite."
        if self.policy == "restore":
            if self._restored_at is not None and step - self._restored_at < SNAPSHOT_EVERY:
                return f" It is the second time within {SNAPSHOT_EVERY} steps: restoring does not help."
            if self._snapshot is None:
                return " No earlier finite parameters were kept, so there is nothing to return to."
            self.learned.load(self._snapshot)
            self._restored_at = step
        self.skipped += 1
        back = f", and the parameters of step {self._snapshot_step} are back" if self.policy == "restore" else ""
        logger.warning("step %d was not finite and is left out%s. %s", step, back, facts)
        return None

    def record(self) -> dict[str, Any]:
        """Give the numbers that a checkpoint stores."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "restored_at": self._restored_at}

    def load_record(self, record: dict[str, Any]) -> None:
        """Continue from the numbers of a checkpoint."""
        self.skipped, self._in_a_row = record["skipped"], record["in_a_row"]
        self._restored_at = record["restored_at"]
