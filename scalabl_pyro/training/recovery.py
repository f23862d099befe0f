"""What can go wrong in a step, what is done about it, and how it is put in words."""

import logging
from typing import Any

from torch import Tensor

from .._errors import check_choice
from .messages import overflown
from .training_state import LearnedState

logger = logging.getLogger(__name__)

POLICIES = ("raise", "skip", "restore")
#: So many steps left out in a row are no accident.
MAX_IN_A_ROW = 10
#: Steps between the copies that ``"restore"`` goes back to; failing again sooner than that ends the training.
SNAPSHOT_EVERY = 50


class Recovery:
    """What follows a step that is not finite. No parameter was changed by it.

    Args:
        policy: ``"raise"``; ``"skip"`` leaves the step out; ``"restore"`` also goes back to parameters and optimizer
            state of up to ``SNAPSHOT_EVERY`` steps ago, and on with later batches and other noise, as Chowdhery et al.
            (PaLM, 2022, section 5.1) did by hand.
        learned: what is copied and restored.

    Attributes:
        skipped: number of steps left out.
    """

    def __init__(self, policy: str, learned: LearnedState) -> None:
        check_choice("on_nonfinite", policy, POLICIES)
        self.policy = policy
        self.learned = learned
        self.skipped = 0
        self._in_a_row = 0
        self._restored_at: int | None = None
        self._snapshot: dict[str, Tensor] | None = None
        self._snapshot_step = 0

    def accept(self) -> None:
        """Told of each step that was finite."""
        self._in_a_row = 0

    def remember(self, step: int, *, now: bool = False) -> None:
        """Copy the state from before ``step``, if one is wanted and due (or ``now``)."""
        if self.policy != "restore":
            return
        is_due = now or self._snapshot is None or step - self._snapshot_step >= SNAPSHOT_EVERY
        if is_due and not overflown(self.learned.objective):  # what it goes back to must be better than what it leaves
            self._snapshot, self._snapshot_step = self.learned.snapshot(), step

    def reject(self, step: int, figures: str) -> str | None:
        """Deal with a step that was not finite; a reason to stop, or None to go on with the next step."""
        if self.policy == "raise":
            return ""
        self._in_a_row += 1
        if self.policy == "skip" and self._in_a_row >= MAX_IN_A_ROW:
            return f" {self._in_a_row} steps in a row were not finite."
        if self.policy == "restore":
            if self._restored_at is not None and step - self._restored_at < SNAPSHOT_EVERY:
                return f" It is the second time within {SNAPSHOT_EVERY} steps: going back does not help."
            if self._snapshot is None:
                return " No parameters from before it are finite."
            self.learned.load(self._snapshot)
            self._restored_at = step
        self.skipped += 1
        back = f", and the parameters of step {self._snapshot_step} are back" if self.policy == "restore" else ""
        logger.warning("step %d was not finite and is left out%s. %s", step, back, figures)
        return None

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "restored_at": self._restored_at}

    def load_record(self, record: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.skipped, self._in_a_row = record["skipped"], record["in_a_row"]
        self._restored_at = record["restored_at"]
