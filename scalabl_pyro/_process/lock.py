"""One lock for what the whole process shares, so that threads may train, sample and predict at the same time.

torch's default generators, Pyro's handler stack and settings, and fast tokenizers belong to the process, not to a
thread. A thread that changes or needs them holds :data:`LOCK` for that time. A training holds it per step. Predictions
run the LLM without it; :mod:`scalabl_pyro.lora.train_mode` counts them.

A child process that was forked has only the thread that forked. :mod:`.forked_child` gives back there what other
threads held.
"""

import threading
from typing import Any


class FairLock:
    """A reentrant lock that a waiting thread gets before the thread that releases it can take it again.

    ``threading.RLock`` is not fair: a training loop that releases it and takes it again at once would keep all other
    threads waiting. Here a waiting thread holds a gate in front of the lock, where the next one has to wait.
    """

    def __init__(self) -> None:
        self._gate = threading.RLock()  # knows its owner, see open_gate
        self._lock = threading.RLock()
        # What threading.Condition uses.
        self._is_owned = self._lock._is_owned  # type: ignore[attr-defined]
        self._release_save = self._lock._release_save  # type: ignore[attr-defined]
        self._acquire_restore = self._lock._acquire_restore  # type: ignore[attr-defined]

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        if self._is_owned():
            return self._lock.acquire()
        with self._gate:
            return self._lock.acquire()

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def open_gate(self) -> None:
        """Open the gate if Ctrl-C inside ``acquire`` left it closed by the present thread."""
        while self._gate._is_owned():  # type: ignore[attr-defined]
            self._gate.release()

    def _at_fork_reinit(self) -> None:
        """Give back, in a forked child, what threads held that the child does not have."""
        for part in (self._gate, self._lock):
            if not part._is_owned():  # type: ignore[attr-defined]
                part._at_fork_reinit()  # type: ignore[attr-defined]

    def is_held(self) -> bool:
        """Tell whether the present thread holds the lock."""
        return bool(self._is_owned())

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: Any) -> None:
        self.release()


#: Reentrant: a function that holds it may call others that take it.
LOCK = FairLock()
#: Notified when a prediction or a training no longer uses a module.
IDLE = threading.Condition(LOCK)  # type: ignore[arg-type]
