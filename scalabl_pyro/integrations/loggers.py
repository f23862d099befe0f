"""Sends the rows of a training to TensorBoard, W&B, MLflow, or any other callback of the transformers Trainer.

transformers has a callback for each of these tools. A :class:`TrainerLog` calls it as a Trainer would, once per row.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .._arguments import known_arguments, known_arguments_of_methods
from .._errors import check_count, describe, nearest
from ..distributed.processes import current_processes

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)

#: Columns of a history row that are the place of the row, and no measurement.
PLACE = ("step",)


@known_arguments_of_methods
class TrainerLog:
    """A callback of ``fit`` that passes each row on to a callback of the transformers Trainer.

    It calls ``on_train_begin`` before the first row, ``on_log`` with the numbers of a row, ``on_evaluate`` with the
    scores of held-out rows, ``on_step_end``, and ``on_train_end`` when it is closed. If the callback sets
    ``control.should_training_stop``, the training stops. Of several processes, the first one logs. A row with an
    earlier step than the last one begins a new training: ``on_train_end`` and ``on_train_begin`` come first.

    Args:
        callback: The callback.
        output_dir: Folder for what the callback writes.
        every: Number of steps between two rows that are logged. Rows with scores of held-out rows always are.
        arguments: Further arguments of ``transformers.TrainingArguments``, such as ``{"run_name": "first"}``.

    Raises:
        ValueError: ``every`` is not a whole number from 1 on.

    Example:
        >>> from scalabl_pyro.integrations.loggers import TrainerLog
        >>> from transformers import PrinterCallback
        >>> with TrainerLog(PrinterCallback(), every=10) as log:
        ...     scalabl_pyro.fit(blora, task, rows, num_steps=20, callbacks=[log])
    """

    def __init__(
        self,
        callback: "TrainerCallback",
        *,
        output_dir: str | Path = "runs",
        every: int = 1,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import TrainingArguments

        check_count(every=every)
        self.callback = callback
        self.every = every
        self.arguments = TrainingArguments(output_dir=str(output_dir), report_to=[], **(arguments or {}))
        self._has_begun = False
        self._start_anew()

    def __call__(self, row: Mapping[str, float]) -> bool:
        """Pass a row of the history on.

        Args:
            row: Row of the history.

        Returns:
            Whether the callback asks to stop the training.
        """
        if self._has_begun and row["step"] < self.state.global_step:
            logger.warning(
                "The log gets step %d after step %d, so another training begins, and the log begins anew. Make one log "
                "per training, with a name or folder of its own, to tell them apart.",
                row["step"],
                self.state.global_step - 1,
            )
            self.close()
        if not self._has_begun:
            self._start_anew()
            self._has_begun = True
            self._call("on_init_end")
            self._call("on_train_begin")
        self.state.global_step = int(row["step"]) + 1
        numbers = {name: value for name, value in row.items() if name not in PLACE and not math.isnan(value)}
        scores = {name: value for name, value in numbers.items() if name[:5] == "eval_"}
        if scores or self.state.global_step % self.every == 0:
            self.state.log_history.append({**numbers, "step": self.state.global_step})
            self._call("on_log", logs=dict(numbers))
        if scores:
            self._call("on_evaluate", metrics=scores)
        self._call("on_step_end")
        return bool(self.control.should_training_stop)

    def close(self) -> None:
        """Tell the callback that the training has ended, so that it writes what it holds back."""
        if self._has_begun:
            self._has_begun = False
            self._call("on_train_end")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _start_anew(self) -> None:
        from transformers import TrainerControl, TrainerState

        first = current_processes().is_first
        self.state = TrainerState(is_local_process_zero=first, is_world_process_zero=first)
        self.control = TrainerControl()

    def _call(self, event: str, **values: Any) -> None:
        found = getattr(self.callback, event)(self.arguments, self.state, self.control, **values)
        self.control = self.control if found is None else found


@known_arguments
def log_to(
    tool: "str | TrainerCallback",
    *,
    output_dir: str | Path = "runs",
    every: int = 1,
    arguments: Mapping[str, Any] | None = None,
) -> TrainerLog:
    """Make a callback of ``fit`` that logs to a tool.

    Args:
        tool: Name of the tool, as in ``report_to`` of the transformers Trainer (``"tensorboard"``, ``"wandb"``,
            ``"mlflow"`` and others), or an instance or class of a ``transformers.TrainerCallback``. The tool must be
            installed, and is configured by its own environment variables, such as ``TENSORBOARD_LOGGING_DIR``,
            ``WANDB_PROJECT``, ``WANDB_MODE`` or ``MLFLOW_TRACKING_URI``.
        output_dir: Folder for what the tool writes, unless its variables name another one.
        every: Number of steps between two rows that are logged. Rows with scores of held-out rows always are.
        arguments: Further arguments of ``transformers.TrainingArguments``, such as ``{"run_name": "first"}``.

    Returns:
        The callback. Use it in a ``with`` statement, or call its ``close()`` after the training.

    Raises:
        ValueError: transformers knows no tool of this name.
        ImportError: The tool is not installed.
        TypeError: ``tool`` is something else.

    Example:
        >>> from scalabl_pyro.integrations.loggers import log_to
        >>> with log_to("tensorboard", output_dir="runs/first") as log:  # doctest: +SKIP
        ...     result = scalabl_pyro.fit(blora, task, rows, num_steps=100, callbacks=[log])
    """
    from transformers import TrainerCallback

    if isinstance(tool, str):
        tool = _named(tool)()
    elif isinstance(tool, type) and issubclass(tool, TrainerCallback):
        tool = tool()
    if not isinstance(tool, TrainerCallback):
        raise TypeError(f"tool is {describe(tool)}, expected a name such as 'tensorboard', or a TrainerCallback.")
    return TrainerLog(tool, output_dir=output_dir, every=every, arguments=arguments)


def _named(name: str) -> Any:
    """Return the factory of the callback of a tool, which raises ImportError if the tool is missing."""
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    if name not in known:
        raise ValueError(f"tool={name!r} is unknown to transformers. {nearest(name, known)}")

    def make() -> Any:
        try:
            return known[name]()
        except RuntimeError as error:
            raise ImportError(f"tool={name!r} is not installed ({error}). Install it: pip install {name}.") from error

    return make
