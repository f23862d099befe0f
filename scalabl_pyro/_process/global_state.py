"""Restores what the whole process shares, if an exception skips the end of a ``with`` block.

Ctrl-C can arrive between the last line of a ``with`` block and its ``__exit__``. Gradients would then stay off, or the
lock would stay taken.
"""

import torch
from pyro import settings
from pyro.poutine.runtime import _PYRO_STACK

from .lock import LOCK
from .random_state import generator_states, set_generator_states


class GlobalState:
    """Grad mode, random states, Pyro's parameter mode and handlers, and whether this thread holds the lock.

    Example:
        >>> before = GlobalState()
        >>> _ = torch.rand(3)
        >>> before.restore()
        >>> bool((torch.get_rng_state() == before.random["cpu"]).all())
        True
    """

    def __init__(self) -> None:
        self.grad_enabled = torch.is_grad_enabled()
        self.random = generator_states()
        self.local_params = settings.get("module_local_params")
        self.handlers = list(_PYRO_STACK)
        self.holds_lock = LOCK.is_held()

    def restore(self) -> None:
        """Make this state the present one."""
        torch.set_grad_enabled(self.grad_enabled)
        set_generator_states(self.random)
        settings.set(module_local_params=self.local_params)
        _PYRO_STACK[:] = self.handlers
        LOCK.open_gate()
        while not self.holds_lock and LOCK.is_held():
            LOCK.release()
