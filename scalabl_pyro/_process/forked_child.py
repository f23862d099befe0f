"""Makes what the process shares usable in a forked child, whatever other threads were doing when it was forked.

A forked child has one thread: a copy of the one that forked. Locks that other threads held would stay taken for ever,
and random states and settings that they had switched would stay switched. So the child frees those locks, and undoes
those changes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.std import TqdmDefaultWriteLock

from .lock import IDLE, LOCK

#: How to undo, in a child, the changes that the holder of the lock has made so far; the last change comes last.
_UNDO: list[Callable[[], None]] = []


@contextmanager
def undone_in_child(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` in a child that another thread forks while this thread is inside the context.

    The caller must hold the lock of the process inside the whole context. A child that this thread forks itself is
    inside the context too, and leaves it as this thread does.

    Args:
        undo: Puts back what the holder of the lock changes inside the context.
    """
    try:
        _UNDO.append(undo)
        yield
    finally:
        if undo in _UNDO:  # Ctrl-C can come before it is
            _UNDO.remove(undo)


def at_fork(function: Callable[[], None]) -> None:
    """Call a function in each forked child, after the lock of the process was freed there."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
        os.register_at_fork(after_in_child=function)


def _free() -> None:
    if not LOCK.is_held():  # else this thread has made the changes, and undoes them itself
        while _UNDO:
            _UNDO.pop()()
    IDLE._at_fork_reinit()  # type: ignore[attr-defined]
    bars = TqdmDefaultWriteLock.th_lock  # each progress bar takes it, also one that is not shown
    if not bars._is_owned():
        bars._at_fork_reinit()


at_fork(_free)
