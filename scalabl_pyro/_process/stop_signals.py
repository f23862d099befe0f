"""Ctrl-C and SIGTERM wait for the end of the running step, so that nothing is half done when they take effect."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Inside the context a signal is kept until :meth:`deliver`; handlers are as before afterwards.

    Only the main thread can do so, and only what would end the program is kept: a handler of the caller's own for
    SIGINT stays in force. A second Ctrl-C takes effect at once, in the middle of a step.

    Args:
        terminate: keep SIGTERM too.

    Attributes:
        received: the signal that waits.
    """

    def __init__(self, *, terminate: bool) -> None:
        self.terminate = terminate
        self.received: int | None = None
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
        if self.received == signal.SIGTERM:  # came too late for the last step; it is not ours to swallow
            signal.raise_signal(signal.SIGTERM)

    def deliver(self) -> None:
        """Let the signal that waits take effect.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for SIGTERM, with status 143 = 128 + 15; the caller's own handler is called instead if there is
                one, and may return.
        """
        signum, self.received = self.received, None
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if signum == signal.SIGTERM:
            handler = self._before.get(signum)  # None where another process received it
            if not callable(handler):
                raise SystemExit(128 + signum)
            handler(signum, None)

    def _keep(self, signum: int) -> None:
        self._before[signum] = signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
