"""Switch a module between train and eval mode while several threads use it."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .._process.forked_child import at_fork
from .._process.lock import IDLE, LOCK
from .._process.random_state import scoped_seed
from .uses import using


@dataclass
class _Use:
    """State of a module in eval mode: the modes to restore, and the number of open contexts per thread."""

    modes: list[tuple[nn.Module, bool]]
    threads: Counter[int] = field(default_factory=Counter)


@dataclass
class _Training:
    """State of a module that is trained: the thread, the modes to restore, and predictions that it had begun before."""

    thread: int
    modes: list[tuple[nn.Module, bool]]
    inside: _Use | None = None
    outer: "_Training | None" = None


#: State of each module in eval mode, by the id of the module.
_IN_USE: dict[int, _Use] = {}
#: State of each module that is trained, by the id of the module.
_TRAINING: dict[int, _Training] = {}


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
        IDLE.wait_for(lambda: _trains(module) in (None, own))
        use = _IN_USE.get(id(module))
        if use is None:
            use = _IN_USE[id(module)] = _Use(_modes(module))
            module.eval()
        use.threads[own] += 1
    try:
        with using(module, "a prediction"):
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
        # Predictions in a callback are counted from zero.
        inside, outer = _IN_USE.pop(id(module), None), _TRAINING.get(id(module))
        training = _TRAINING[id(module)] = _Training(own, _modes(module), inside, outer)
        module.eval()
    try:
        with using(module, "a training"):
            yield
    finally:
        with LOCK:
            _end(id(module), training)
            IDLE.notify_all()


def _end(key: int, training: _Training) -> None:
    """Put a module back as it was before a training."""
    _restore(training.modes)
    if training.inside is not None:
        _IN_USE[key] = training.inside
    if training.outer is None:
        del _TRAINING[key]
    else:
        _TRAINING[key] = training.outer


def _forget_other_threads() -> None:
    """End, in a forked child, what threads did that the child does not have."""
    own = threading.get_ident()
    for key in list(_TRAINING):
        while key in _TRAINING and _TRAINING[key].thread != own:
            _end(key, _TRAINING[key])
    for key, use in list(_IN_USE.items()):
        use.threads = Counter({own: use.threads[own]} if use.threads[own] else {})
        if not use.threads:
            _restore(_IN_USE.pop(key).modes)


at_fork(_forget_other_threads)


def _trains(module: nn.Module) -> int | None:
    training = _TRAINING.get(id(module))
    return None if training is None else training.thread


def _other_threads(module: nn.Module, own: int) -> set[int]:
    """Return the threads that predict with the module or train it, except the thread ``own``."""
    use = _IN_USE.get(id(module))
    trains = _trains(module)
    busy = set(() if use is None else use.threads) | (set() if trains is None else {trains})
    return busy - {own}


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(m, m.training) for m in module.modules()]


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for m, mode in modes:
        m.training = mode
