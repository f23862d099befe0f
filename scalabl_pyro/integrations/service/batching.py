"""Dynamic batching: one thread runs requests that wait together as one batch."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .limits import Refused

logger = logging.getLogger(__name__)

Answers = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that was checked.

    Attributes:
        run: Function that answers several jobs at once, with one answer per job, in their order.
        items: Rows or prompts.
        key: Jobs with equal keys may share a batch. None means that the job runs alone.
        examples: Tokenized rows, where the answer needs them.
        options: Options of this request.
    """

    run: Callable[[Sequence["Job"]], Answers]
    items: list[Any]
    key: Hashable | None
    examples: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Waiting:
    job: Job
    future: "Future[dict[str, Any]]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """A queue of jobs, and the thread that answers them in their order.

    A batch holds the first job that waits, and the jobs behind it as long as their keys are equal and their rows fit.
    A job with more rows than a batch runs by itself. If a joint batch fails, each of its jobs runs once more, alone. So
    only the job that is the cause gets the error.

    Args:
        max_rows: Largest number of rows of a joint batch.
        max_wait: Seconds that a job waits for others to join it. A job that has waited for the thread does not wait
            again.

    Example:
        >>> batcher = Batcher(max_rows=16, max_wait=0.005)
        >>> run = lambda jobs: [{"count": len(job.items)} for job in jobs]
        >>> batcher.submit(Job(run=run, items=["row"], key="count")).result()
        {'count': 1}
        >>> batcher.close()
    """

    def __init__(self, *, max_rows: int, max_wait: float) -> None:
        self._max_rows = max_rows
        self._max_wait = max_wait
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        """Whether jobs are accepted."""
        return not self._is_closed

    def __len__(self) -> int:
        """Number of jobs that wait."""
        return len(self._waiting)

    def open(self) -> None:
        """Accept jobs, also after :meth:`close`."""
        with self._changed:
            self._is_closed = False

    def submit(self, job: Job) -> "Future[dict[str, Any]]":
        """Put a job at the end of the queue.

        Args:
            job: The job.

        Returns:
            Future of its answer. Cancel it to take the job back, if it does not run yet.

        Raises:
            Refused: The service shuts down (503).
        """
        waiting = _Waiting(job)
        with self._changed:
            if self._is_closed:
                raise Refused(503, "The service shuts down: send the request to another one, or later.")
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="scalabl-batches", daemon=True)
                self._thread.start()
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.future

    def close(self, timeout: float | None = None) -> None:
        """Accept no more jobs, answer those that wait, and end the thread.

        Args:
            timeout: Seconds after which jobs that still wait are refused.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(Refused(503, "The service shut down before it came to this request."))

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[_Waiting]:
        """Wait for the next batch; it is empty when the queue is closed."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._waiting:
                    if self._is_closed:
                        self._thread = None
                        return []
                    self._changed.wait()
                    continue
                count, is_full = self._joint()
                left = self._waiting[0].since + self._max_wait - time.monotonic()
                if not (is_full or self._is_closed or left <= 0):
                    self._changed.wait(left)
                    continue
                batch = [self._waiting.popleft() for _ in range(count)]
                if batch := [one for one in batch if one.future.set_running_or_notify_cancel()]:
                    return batch

    def _drop_cancelled(self) -> None:
        while self._waiting and self._waiting[0].future.cancelled():
            self._waiting.popleft()

    def _joint(self) -> tuple[int, bool]:
        """Return the number of jobs at the head of the queue that make a batch, and whether no later one can join."""
        first = self._waiting[0].job
        rows = len(first.items)
        if first.key is None or rows >= self._max_rows:
            return 1, True
        for count, waiting in enumerate(self._waiting):
            if count == 0:
                continue
            rows += len(waiting.job.items)
            if waiting.job.key != first.key or rows > self._max_rows:
                return count, True
        return len(self._waiting), rows >= self._max_rows

    def _answer(self, batch: list[_Waiting]) -> None:
        jobs = [waiting.job for waiting in batch]
        try:
            answers = jobs[0].run(jobs)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            logger.warning("A batch of %d requests failed (%s): each runs alone.", len(batch), type(error).__name__)
            for waiting in batch:
                self._answer([waiting])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            waiting.future.set_result(answer)
