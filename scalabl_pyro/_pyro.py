"""The base class of every Pyro program here."""

import pyro
from pyro.nn import PyroModule


class Program(PyroModule):
    """A PyroModule that runs in both of Pyro's parameter modes.

    Stock ``SVI`` keeps parameters in Pyro's global store; ELBO modules under
    ``pyro.settings.context(module_local_params=True)`` leave that store empty. A context that was created in the
    second mode serves both, one created in the first only the first.
    """

    def __init__(self) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()
