"""Takes one optimizer step after another, reads their statistics, and keeps the history."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .._process.random_state import Stream
from .._process.stop_signals import StopSignals
from ..data.batch import Batch
from ..data.training_batches import Cycle
from ..lora.sharding import is_sharded
from ..storage.tensor_files import below, not_finite
from .fresh_start import Start
from .held_out import HeldOut
from .history import COLUMNS, PER_TOKEN, Pending, kl_of, row_of, rows_of
from .messages import StepStatistics, describe_batch, names_of, overflown, reason, too_large, where_not_finite
from .objective import TrainingObjective
from .optimizer import set_rates
from .options import OnNonfinite
from .recovery import Recovery
from .scope import step_scope
from .step import EagerStep
from .training_state import LearnedState

logger = logging.getLogger(__name__)

#: How the names of saved tensors begin: columns of the history, states of random generators, and the best state.
HISTORY, RANDOM, BEST = "history.", "random.", "best."
#: Number of batches that are kept for a look back at the end.
NUM_RECENT = 16

Callback = Callable[[dict[str, float]], bool | None]


class Trainer:
    """Take steps, read their statistics, and keep the history.

    Args:
        execute: Takes one step, see :class:`~scalabl_pyro.training.step.EagerStep`.
        batches: Gives the batch of a step.
        noise: Random stream of the steps. It is in use inside each step only.
        kl_weight: Gives the weight of the KL at a step.
        rate: Gives the factor of the learning rates at a step.
        lr: Learning rate of B, for the history.
        num_data: N.
        read_every: Number of steps after which the host reads their statistics. On a GPU each reading waits for it.
        on_nonfinite: See :class:`~scalabl_pyro.training.recovery.Recovery`.
        signals: Signals to deliver between two steps.
        save: Saves the trainer, after every ``save_every`` steps and before a signal is delivered.
        save_every: Number of steps between two calls of ``save``; None for no calls.
        num_tokens: Counts the tokens of the answers in a batch; None where the answers are not texts.
        held_out: Evaluates held-out rows, and may end the run; None where there are no such rows.
        start: Whether the first step starts at the values of the wrapping, or at those of an earlier training. A
            resumed run keeps the start that its checkpoint names.

    Attributes:
        history: One row per step that was taken and read.
        next_step: Number of the next step.
        recent: The last batches.
        is_whole: False inside a step, when some parameters may have moved and others not.
    """

    def __init__(
        self,
        execute: EagerStep[TrainingObjective],
        *,
        batches: Callable[[int], Batch],
        noise: Stream,
        kl_weight: Callable[[int], float],
        rate: Callable[[int], float],
        lr: float,
        num_data: int,
        read_every: int = 1,
        on_nonfinite: OnNonfinite = "raise",
        signals: StopSignals | None = None,
        save: Callable[["Trainer"], None] = lambda trainer: None,
        save_every: int | None = None,
        start: Start = "fresh",
        num_tokens: Callable[[Batch], int | None] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.execute = execute
        self.batches = batches
        self.noise = noise
        self.kl_weight = kl_weight
        self.rate = rate
        self.lr = lr
        self.num_data = num_data
        self.read_every = read_every
        self.signals = signals or StopSignals(terminate=False)
        self.save = save
        self.save_every = save_every
        self.start = start
        self.num_tokens = num_tokens
        self.held_out = held_out
        self.columns = (*COLUMNS, *((PER_TOKEN,) if num_tokens else ()), *(held_out.columns if held_out else ()))
        self.learned = LearnedState(execute.objective, execute.optimizer)
        self.recovery = Recovery(on_nonfinite, self.learned)
        self.history: list[dict[str, float]] = []
        self.next_step = 0
        self.is_whole = True
        self.recent: deque[Batch] = deque(maxlen=NUM_RECENT)
        self._pending: list[Pending] = []
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, added up over all resumptions of the run."""
        return time.perf_counter() - self._start

    def run(self, steps: Sequence[int]) -> Iterator[dict[str, float]]:
        """Take the ``steps`` and yield their history rows, in order, as the host reads them.

        Raises:
            FloatingPointError: A loss or gradient is not finite; the message says why. This step and later ones have
                changed no parameter.
            RuntimeError: No gradient reaches some layers.
        """
        validates = not is_sharded(self.execute.objective.model.blora.llm)  # other processes would wait for ever
        with self.execute.check or nullcontext():
            if self._is_evaluation(self.next_step) and self.history:  # the run was stopped between step and evaluation
                yield from self._evaluated([])
            for step in steps:
                if self.held_out is not None and self.held_out.is_over:
                    return
                if not self._pending:
                    self.recovery.remember(step)
                is_stopped = self._take(step, validate=validates and step == steps[0])
                is_due = self.save_every is not None and (step + 1) % self.save_every == 0
                is_evaluation = self._is_evaluation(step + 1) and not is_stopped
                must_read = step in (steps[0], steps[-1]) or is_due or is_stopped  # the first step is slow anyway
                if must_read or is_evaluation or len(self._pending) >= self.read_every:
                    yield from self._evaluated(self.read()) if is_evaluation else self.read()
                if is_due or is_stopped:
                    self.save(self)
                    self.recovery.remember(step + 1, now=is_due)  # where a run that resumes from here begins
                if is_stopped:
                    self.signals.deliver()

    def read(self) -> Iterator[dict[str, float]]:
        """Read the statistics of all steps since the last reading and yield their history rows."""
        while self._pending:
            pending, self._pending = self._pending, []
            values = torch.stack([p.statistics for p in pending]).tolist()
            for number, (taken, numbers) in enumerate(zip(pending, values, strict=True)):
                statistics = StepStatistics(*numbers)
                if not statistics.is_finite:
                    self._recover(taken, statistics)
                    for later in pending[number + 1 :]:  # the flag has kept these from updating, too
                        self._take(later.step, later.batch)
                    break
                self.recovery.accept()
                row = self._row(taken, statistics)
                self.history.append(row)
                yield row

    def _is_evaluation(self, num_taken: int) -> bool:
        return self.held_out is not None and self.held_out.is_due(num_taken)

    def _evaluated(self, rows: Iterable[dict[str, float]]) -> Iterator[dict[str, float]]:
        """Yield rows, and hold the last one back until it has the scores of the held-out rows."""
        last = None
        try:
            for row in rows:
                if last is not None:
                    yield last
                last = row
            if self.held_out is not None and self.history:
                self.held_out.evaluate(self.history[-1], self.next_step, self.learned)
                last = self.history[-1]
        except FloatingPointError:
            if last is not None:
                yield last
            raise
        if last is not None:
            yield last

    def overflown(self) -> list[str]:
        """List the names of parameters and moments that have no finite value."""
        moments = not_finite(below(self.learned.trained(), "optimizer."))
        return overflown(self.execute.objective) + [f"optimizer.{name}" for name in moments]

    @property
    def has_unread(self) -> bool:
        """Whether steps were taken whose statistics the host has not read."""
        return bool(self._pending)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give tensors and record of all that a resumption needs, except for the options of the run."""
        assert self.is_whole and not self._pending
        columns = self.columns if self.history else ()
        rows = {HISTORY + c: torch.tensor([r[c] for r in self.history], dtype=torch.float64) for c in columns}
        random = {RANDOM + name: state for name, state in self.noise.states().items()}
        record: dict[str, Any] = {"step": self.next_step, "seconds": self.seconds, "columns": list(columns)}
        record["start"] = self.start
        record["recovery"] = self.recovery.record()
        record["data"] = self.batches.position() if isinstance(self.batches, Cycle) else None
        record["evaluation"] = self.held_out.record() if self.held_out else None
        best = {BEST + name: tensor for name, tensor in (self.held_out.tensors() if self.held_out else {}).items()}
        return self.learned.tensors() | rows | random | best, record

    def load_state(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
            ValueError: The tensors are those of another run, or the data source gives other batches than before.
        """
        history = rows_of(below(tensors, HISTORY), record["columns"])
        if isinstance(self.batches, Cycle):
            if record["data"] is None:
                raise ValueError("it does not say where in the data the run was")
            self.batches.replay(record["data"])
        states = below(tensors, RANDOM)
        try:
            unmatched = self.noise.load_states(states)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"the random states are not states of torch's generators ({error})") from error
        if unmatched:
            logger.warning(
                "the random generators %s are only in the checkpoint, or only on this machine: the training goes on, "
                "but its noise differs from that of an uninterrupted run",
                unmatched,
            )
        if self.held_out is not None:
            self.held_out.load_state(below(tensors, BEST), record.get("evaluation"), self.learned)
        self.learned.load({k: v for k, v in tensors.items() if not k.startswith((HISTORY, RANDOM, BEST))})
        self.history = history
        self.start = "continued" if record.get("start") == "continued" else "fresh"
        self.recovery.load_record(record["recovery"])
        self.next_step = record["step"]
        self._start = time.perf_counter() - record["seconds"]

    def _take(self, step: int, batch: Batch | None = None, *, validate: bool = False) -> bool:
        """Take a step and keep its statistics on the device.

        Args:
            step: Number of the step.
            batch: Its batch, or None to read it.
            validate: Whether Pyro checks the arguments of distributions.

        Returns:
            Whether a signal waits to be delivered, in this process or in another one.
        """
        weight, rate = self.kl_weight(step), self.rate(step)
        with step_scope(self.noise, validate=validate):
            if batch is None:
                batch = self.batches(step)
                self.recent.append(batch)
            set_rates(self.execute.optimizer, rate)
            self.is_whole = False
            result = self.execute(batch, weight)
            self.is_whole, self.next_step = True, step + 1
        self._pending.append(Pending(step, batch, weight, rate * self.lr, self.seconds, result.statistics))
        if not self.execute.processes.are_several:
            return self.signals.received is not None
        if result.signal:  # all processes stop at the same step, whichever of them received it
            self.signals.adopt(result.signal)
        return bool(result.signal)

    def _recover(self, taken: Pending, statistics: StepStatistics) -> None:
        facts = describe_batch(
            taken.batch, statistics, kl_of(taken, statistics, self.num_data), self.execute.objective.guide
        )
        self.is_whole = False
        if statistics.had_finite_gradient:  # whatever the policy: the next update would be as large
            check, is_last = self.execute.update_check, self.next_step == taken.step + 1
            rejected = check.rejected if check is not None and is_last else []
            raise FloatingPointError(too_large(taken.step, names_of(self.execute.objective, rejected), facts))
        stop = self.recovery.reject(taken.step, facts)
        if stop is not None:
            cause = None if math.isfinite(statistics.loss) else self._explain(taken.batch)
            is_last = self.next_step == taken.step + 1  # else the gradients belong to a later step
            where = where_not_finite(self.execute.objective.model.blora.adapter) if is_last else ""
            raise FloatingPointError(reason(taken.step, statistics, facts, cause, where) + stop)
        self.execute.blocked.zero_()
        self.is_whole = True

    def _explain(self, batch: Batch) -> str:
        """Say why the loss is not finite. Among processes, the first that finds a cause in its rows decides."""
        own, _ = self.execute.processes.shard(batch)
        with step_scope(self.noise):
            found = self.execute.processes.all_gather(
                lambda: self.execute.objective.explain(own.to(self.execute.device))
            )
        return next((cause for cause in found if cause.startswith("site")), found[0])

    def _row(self, taken: Pending, statistics: StepStatistics) -> dict[str, float]:
        row = row_of(taken, statistics, num_data=self.num_data, skipped=self.recovery.skipped)
        return {name: math.nan for name in self.columns} | row | self._per_token(taken.batch, statistics.nll)

    def _per_token(self, batch: Batch, nll: float) -> dict[str, float]:
        count = self.num_tokens(batch) if self.num_tokens is not None else None
        return {PER_TOKEN: nll * len(batch) / count} if count else {}
