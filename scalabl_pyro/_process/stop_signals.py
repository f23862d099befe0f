"""Delays Ctrl-C and SIGTERM until the running step ends, so that no step stays half done."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Keep signals inside the context until :meth:`deliver`. Afterwards the handlers are as before.

    Only the main thread can keep signals. It keeps only those that would end the program: a handler of the caller's own
    for SIGINT stays in force. A second Ctrl-C takes effect at once, in the middle of a step.

    Args:
        terminate: Whether to keep SIGTERM too.

    Attributes:
        received: Number of the signal that waits, or None.
        delivered: Whether a signal took effect between two steps. If several processes work together, it did so in
            all of them at the same step. A second Ctrl-C takes effect in one process only.
    """

    def __init__(self, *, terminate: bool) -> None:
        self.terminate = terminate
        self.received: int | None = None
        self.delivered = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._keep(signal.SIGINT)
            if self.terminate and signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_IGN):
                self._keep(signal.SIGTERM)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self.received == signal.SIGTERM:  # it came after the last step; raise it for the caller
            signal.raise_signal(signal.SIGTERM)

    def adopt(self, signum: int) -> None:
        """Take over a signal that another process has received."""
        self.received = signum

    def deliver(self) -> None:
        """Let the signal that waits take effect.

        Raises:
            KeyboardInterrupt: The signal is SIGINT.
            SystemExit: The signal is SIGTERM; the status is 143 = 128 + 15. If the caller has a handler of its own,
                that handler is called instead, and may return.
        """
        signum, self.received = self.received, None
        self.delivered = signum is not None
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum == signal.SIGTERM:
            handler = self._before.get(signum)  # None if another process received the signal
            if not callable(handler):
                raise SystemExit(128 + signum)
            handler(signum, None)

    def _keep(self, signum: int) -> None:
        self._before[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
