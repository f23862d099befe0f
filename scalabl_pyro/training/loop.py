"""One optimizer step after another: what the host reads of them and when, and the history that it makes of it."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from .._process.random_state import generator_states, set_generator_states
from .._process.stop_signals import StopSignals
from ..data.batch import Batch
from ..data.training_batches import Cycle
from ..lora.sharding import is_sharded
from ..storage.tensor_files import check_keys
from .gradient_check import GradientCheck
from .messages import StepStatistics, describe, overflown, reason, where_not_finite
from .optimizer import set_rates
from .recovery import Recovery
from .step import EagerStep
from .training_state import LearnedState

logger = logging.getLogger(__name__)

#: Of the history.
COLUMNS = ("step", "loss", "nll", "kl", "kl_weight", "grad_norm", "lr", "seconds", "skipped")

Callback = Callable[[dict[str, float]], bool | None]


class Pending(NamedTuple):
    """A step whose figures the host has not read yet."""

    step: int
    batch: Batch
    kl_weight: float
    rate: float
    seconds: float
    figures: Tensor


class Trainer:
    """Steps, and what is known of them.

    Args:
        execute: one step, see :class:`~scalabl_pyro.training.step.EagerStep`.
        batches: step -> batch.
        kl_weight: step -> weight of the KL.
        rate: step -> factor of the learning rates.
        lr: learning rate of B, for the history.
        num_data: N.
        read_every: steps after which the host reads the figures; on a GPU each reading waits for it.
        on_nonfinite: see :class:`~scalabl_pyro.training.recovery.Recovery`.
        signals: delivered between steps.

    Attributes:
        history: a row for each step that was taken and read.
        next_step: number of the step to come.
        is_whole: False within a step, when parameters may have moved in part.
        save: called after every ``save_every`` steps, and before a signal is delivered.
    """

    def __init__(
        self,
        execute: EagerStep,
        *,
        batches: Callable[[int], Batch],
        kl_weight: Callable[[int], float],
        rate: Callable[[int], float],
        lr: float,
        num_data: int,
        read_every: int = 1,
        on_nonfinite: str = "raise",
        signals: StopSignals | None = None,
    ) -> None:
        self.execute = execute
        self.batches = batches
        self.kl_weight = kl_weight
        self.rate = rate
        self.lr = lr
        self.num_data = num_data
        self.read_every = read_every
        self.signals = signals
        execute.signal = lambda: (signals and signals.received) or 0
        self.learned = LearnedState(execute.objective, execute.optimizer)
        self.recovery = Recovery(on_nonfinite, self.learned)
        self.history: list[dict[str, float]] = []
        self.next_step = 0
        self.is_whole = True
        self.save: Callable[[], None] = lambda: None
        self.save_every: int | None = None
        self._pending: list[Pending] = []
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time in training, over all runs that it took."""
        return time.perf_counter() - self._start

    def run(self, steps: Sequence[int]) -> Iterator[dict[str, float]]:
        """Go through ``steps`` and yield their history rows, in order, as they are read.

        Raises:
            FloatingPointError: a loss or gradient that is not finite, with the reason; no parameter was changed by it
                or since.
            RuntimeError: a layer that no gradient reaches.
        """
        blora = self.execute.objective.model.blora
        check = GradientCheck(blora)
        self.execute.check = check
        validates = not is_sharded(blora.llm)  # an error before the backward pass would leave the others alone in it
        try:
            for step in steps:
                if not self._pending:
                    self.recovery.remember(step)
                batch = self.batches(step)
                with pyro.validation_enabled(validates and step == steps[0]):
                    self._take(step, batch)
                is_due = self.save_every is not None and (step + 1) % self.save_every == 0
                is_stopped = self._is_stopped()
                is_asked = step in (steps[0], steps[-1]) or is_due or is_stopped  # the first one is waited for anyway
                if is_asked or len(self._pending) >= self.read_every:
                    yield from self.read()
                if is_due or is_stopped:
                    self.save()
                    self.recovery.remember(step + 1, now=is_due)  # where a run that resumes from here begins
                if is_stopped:
                    assert self.signals is not None
                    self.signals.deliver()
        finally:
            self.execute.check = None
            check.close()

    def read(self) -> Iterator[dict[str, float]]:
        """Rows of the steps since the last reading."""
        while self._pending:
            pending, self._pending = self._pending, []
            figures = torch.stack([p.figures for p in pending]).tolist()
            for number, (one, told) in enumerate(zip(pending, figures, strict=True)):
                own = StepStatistics(*told)
                if not own.is_finite:
                    self._recover(one, own)
                    for later in pending[number + 1 :]:  # the flag has kept them from updating, too
                        self._take(later.step, later.batch)
                    break
                self.recovery.accept()
                row = self._row(one, own)
                self.history.append(row)
                yield row

    def overflown(self) -> list[str]:
        """Names of parameters that the last update left without a finite value."""
        return overflown(self.execute.objective)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and record of all that going on from here needs; the options of the run are not part of it."""
        assert self.is_whole and not self._pending
        columns = COLUMNS if self.history else ()
        rows = {f"history.{c}": torch.tensor([r[c] for r in self.history], dtype=torch.float64) for c in columns}
        random = {f"random.{name}": state for name, state in generator_states().items()}
        record: dict[str, Any] = {"step": self.next_step, "seconds": self.seconds, "columns": list(columns)}
        record["recovery"] = self.recovery.record()
        record["data"] = self.batches.position() if isinstance(self.batches, Cycle) else None
        return self.learned.tensors() | rows | random, record

    def load_state(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`, inside the random scope of the run.

        Raises:
            ValueError: tensors of another run, or data that does not come again.
        """
        history = _rows({k: v for k, v in tensors.items() if k.startswith("history.")}, record["columns"])
        if isinstance(self.batches, Cycle):
            if record["data"] is None:
                raise ValueError("it does not say where in the data the run was")
            self.batches.replay(record["data"])
        states = {k.removeprefix("random."): v for k, v in tensors.items() if k.startswith("random.")}
        try:
            unmatched = set_generator_states(states)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"the random states are none of torch's ({error})") from error
        if unmatched:
            logger.warning("no random state for %s: the noise from here on is not what it would have been", unmatched)
        self.learned.load({k: v for k, v in tensors.items() if not k.startswith(("history.", "random."))})
        self.history = history
        self.recovery.load_record(record["recovery"])
        self.next_step = record["step"]
        self._start = time.perf_counter() - record["seconds"]

    def _take(self, step: int, batch: Batch) -> None:
        """Do a step; its figures stay on the device."""
        weight, rate = self.kl_weight(step), self.rate(step)
        set_rates(self.execute.optimizer, rate)
        self.is_whole = False
        figures = self.execute(batch, weight)
        self.is_whole, self.next_step = True, step + 1
        self._pending.append(Pending(step, batch, weight, rate * self.lr, self.seconds, figures))

    def _is_stopped(self) -> bool:
        """Whether a signal waits; of several processes, whether one was told of in their last step."""
        if self.signals is None:
            return False
        if self.execute.processes.are_several:
            self.signals.received = self.execute.agreed_signal or self.signals.received
            return bool(self.execute.agreed_signal)
        return self.signals.received is not None

    def _recover(self, one: Pending, figures: StepStatistics) -> None:
        facts = describe(one.batch, figures, self._kl(one, figures), self.execute.objective.guide)
        self.is_whole = False
        stop = self.recovery.reject(one.step, facts)
        if stop is not None:
            cause = None if math.isfinite(figures.loss) else self._explain(one.batch)
            is_last = self.next_step == one.step + 1  # else the gradients that are there belong to a later step
            where = where_not_finite(self.execute.objective.model.blora.adapter) if is_last else ""
            raise FloatingPointError(reason(one.step, figures, facts, cause, where) + stop)
        self.execute.blocked.zero_()
        self.is_whole = True

    def _explain(self, batch: Batch) -> str:
        """Why the loss is not finite: the first process that finds a cause in its rows is believed by all."""
        own, _ = self.execute.processes.shard(batch)
        found = self.execute.processes.all_gather(lambda: self.execute.objective.explain(own.to(self.execute.device)))
        return next((cause for cause in found if cause.startswith("site")), found[0])

    def _row(self, one: Pending, figures: StepStatistics) -> dict[str, float]:
        return {
            "step": one.step,
            "loss": figures.loss,
            "nll": figures.nll,
            "kl": self._kl(one, figures),
            "kl_weight": one.kl_weight,
            "grad_norm": figures.grad_norm,
            "lr": one.rate,
            "seconds": one.seconds,
            "skipped": self.recovery.skipped,
        }

    def _kl(self, one: Pending, figures: StepStatistics) -> float:
        """Unweighted, nats per data set."""
        return figures.weighted_kl * self.num_data / one.kl_weight if one.kl_weight else float("nan")


def _rows(saved: Mapping[str, Tensor], columns: Sequence[str]) -> list[dict[str, float]]:
    """A history from its columns.

    Raises:
        ValueError: they are no table, or count steps in no whole numbers.
    """
    check_keys("The saved history", set(saved), {f"history.{name}" for name in columns})
    table = {name: saved[f"history.{name}"] for name in columns}
    if any(column.dim() != 1 or len(column) != len(table["step"]) for column in table.values()):
        raise ValueError("the columns of the saved history differ in length")
    rows = [dict(zip(table, row, strict=True)) for row in zip(*(c.tolist() for c in table.values()), strict=True)]
    counted = ("step", "skipped")
    if not all(torch.isfinite(table[name]).all() for name in counted if table):
        raise ValueError("the steps of the saved history are no numbers")
    return [row | {name: int(row[name]) for name in counted} for row in rows]
