"""Counts the passes through each module, so that no layer is taken out while a pass computes with it."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .._process.forked_child import at_fork


class _Use:
    """One open context. Its frame holds the only reference, so a use also ends where an interrupt skips the end.

    Args:
        module: Module that is used.
        what: What it is used for, in words.
    """

    def __init__(self, module: nn.Module, what: str) -> None:
        self.module = id(module)
        self.what = what
        self.thread = threading.get_ident()


_LOCK = threading.RLock()  # the garbage collector may end a use anywhere
_USES: weakref.WeakSet[_Use] = weakref.WeakSet()


@contextmanager
def using(module: nn.Module, what: str) -> Iterator[None]:
    """Keep :func:`not_in_use` from taking layers out of a module inside the context.

    Args:
        module: Module that is used.
        what: What it is used for, in words, such as ``"a prediction"``.
    """
    use = _Use(module, what)
    with _LOCK:
        _USES.add(use)
    try:
        yield
    finally:
        with _LOCK:
            _USES.discard(use)


@contextmanager
def not_in_use(module: nn.Module) -> Iterator[None]:
    """Check that nothing uses a module, and let no new use begin inside the context.

    Args:
        module: Module whose layers are about to change.

    Raises:
        RuntimeError: A thread uses the module.
    """
    with _LOCK:
        own = threading.get_ident()
        for use in list(_USES):
            if use.module == id(module):
                who = "an open context of this thread" if use.thread == own else "another thread"
                raise RuntimeError(
                    f"The layers cannot be taken out of the module now, because {who} uses it for {use.what}, which "
                    "would go on with wrong numbers. Wait until that has ended, and call unload() again."
                )
        yield


def _forget_other_threads() -> None:
    """Forget, in a forked child, the uses of threads that the child does not have."""
    global _LOCK
    _LOCK = threading.RLock()
    for use in list(_USES):
        if use.thread != threading.get_ident():
            _USES.discard(use)


at_fork(_forget_other_threads)
