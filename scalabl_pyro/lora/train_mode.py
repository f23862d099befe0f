"""Train and eval modes of a module that several threads use at once."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .._process.lock import IDLE, LOCK


@dataclass
class _Use:
    """State of a module in eval mode: the modes to restore, and how often each thread is inside."""

    modes: list[tuple[nn.Module, bool]]
    threads: Counter[int] = field(default_factory=Counter)


_IN_USE: dict[int, _Use] = {}
#: Thread that trains each module.
_TRAINING: dict[int, int] = {}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """No dropout inside the context; the train mode of each submodule as before afterwards.

    Threads may be inside together: the first to come saves the modes, the last to leave restores them.
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
def sole_use(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode for training, and let no other thread use it meanwhile.

    It waits for predictions and trainings on ``module`` in other threads, and they wait for it. Other modules stay
    free.
    """
    own = threading.get_ident()
    with LOCK:
        IDLE.wait_for(lambda: not _other_threads(module, own))
        outer = _TRAINING.get(id(module))
        _TRAINING[id(module)] = own
        modes = _modes(module)
        inside = _IN_USE.pop(id(module), None)  # of this thread: a callback's predictions count anew
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
    """Threads that predict with the module or train it, except one."""
    use = _IN_USE.get(id(module))
    trains = {_TRAINING[id(module)]} if id(module) in _TRAINING else set()
    return (trains | set(() if use is None else use.threads)) - {own}


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(m, m.training) for m in module.modules()]


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, mode in modes:
        m.training = mode
