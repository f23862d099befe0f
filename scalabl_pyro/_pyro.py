"""The base class of every Pyro program here, and the mode its parameters are used in."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
from pyro.nn import PyroModule

from ._lock import LOCK


@contextmanager
def local_params() -> Iterator[None]:
    """Parameters stay in their modules and Pyro's global store empty; one thread at a time, as the mode is global."""
    with LOCK, pyro.settings.context(module_local_params=True):
        yield


class Program(PyroModule):
    """A PyroModule that runs in both of Pyro's parameter modes.

    Stock ``SVI`` keeps parameters in Pyro's global store; ELBO modules under
    ``pyro.settings.context(module_local_params=True)`` leave that store empty. A context that was created in the
    second mode serves both, one created in the first only the first.
    """

    def __init__(self) -> None:
        with local_params():
            super().__init__()
