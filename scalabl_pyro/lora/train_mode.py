"""Switch a module between train and eval mode while several threads use it."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .._process.lock import IDLE, LOCK
from .._process.random_state import scoped_seed


@dataclass
class _Use:
    """State of a module in eval mode: the modes to restore, and the number of open contexts per thread."""

    modes: list[tuple[nn.Module, bool]]
    threads: Counter[int] = field(default_factory=Counter)


#: State of each module in eval mode, by the id of the module.
_IN_USE: dict[int, _Use] = {}
#: Thread that trains a module, by the id of the module.
_TRAINING: dict[int, int] = {}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode (no dropout), and restore the mode of each submodule afterwards.

    Several threads may be inside at once. The first one to enter saves the modes, the last one to leave restores them.
    A thread waits while another thread trains the module.

    Args:
        module: Module to put into eval mode.
    """
    own = threading.get_ident()
    with LOCK:
        IDLE.wait_for(lambda: _TRAINING.get(id(module), own) == own)
        use = _IN_USE.get(id(module))
        if use is None:
            use = _IN_USE[id(module)] = _Use(_modes(module))
            module.eval()
        use.threads[own] += 1
    try:
        yield
    finally:
        with LOCK:
            use.threads[own] -= 1
            use.threads = +use.threads
            if not use.threads:
                del _IN_USE[id(module)]
                _restore(use.modes)
                IDLE.notify_all()


@contextmanager
def apart(module: nn.Module) -> Iterator[None]:
    """Run a module aside: in eval mode, and without a change of the global random states."""
    with eval_mode(module), scoped_seed(0):
        yield


@contextmanager
def sole_use(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for training, and keep other threads from using it meanwhile.

    The context waits until other threads finish their predictions and trainings on ``module``. They then wait for it.
    Other modules are not affected.

    Args:
        module: Module to train.
    """
    own = threading.get_ident()
    with LOCK:
        IDLE.wait_for(lambda: not _other_threads(module, own))
        outer = _TRAINING.get(id(module))
        _TRAINING[id(module)] = own
        modes = _modes(module)
        inside = _IN_USE.pop(id(module), None)  # opened by this thread: predictions in a callback are counted from zero
        module.eval()
    try:
        yield
    finally:
        with LOCK:
            _restore(modes)
            if inside is not None:
                _IN_USE[id(module)] = inside
            if outer is None:
                del _TRAINING[id(module)]
            IDLE.notify_all()


def _other_threads(module: nn.Module, own: int) -> set[int]:
    """Return the threads that predict with the module or train it, except the thread ``own``."""
    use = _IN_USE.get(id(module))
    trains = {_TRAINING[id(module)]} if id(module) in _TRAINING else set()
    return (trains | set(() if use is None else use.threads)) - {own}


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(m, m.training) for m in module.modules()]


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, mode in modes:
        m.training = mode
