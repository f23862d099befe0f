"""The base class of all Pyro programs here: it supports both of Pyro's parameter modes, and keeps plates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger

from .._arguments import known_arguments
from .lock import LOCK


@contextmanager
def local_params() -> Iterator[None]:
    """Keep parameters in their modules and Pyro's global store empty. One thread at a time: the mode is global."""
    with LOCK, pyro.settings.context(module_local_params=True):
        yield


class Program(PyroModule):
    """A PyroModule that runs in both of Pyro's parameter modes.

    Stock ``SVI`` keeps parameters in Pyro's global store; ELBO modules under
    ``pyro.settings.context(module_local_params=True)`` leave that store empty. A context that was created in the
    second mode works in both modes; a context from the first mode works only there.

    Constructors of subclasses refuse unknown keyword arguments with the nearest valid name.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = known_arguments(cls.__init__)  # type: ignore[method-assign]

    @known_arguments
    def __init__(self) -> None:
        with local_params():
            super().__init__()


class KeepPlates(Messenger):
    """Give a latent the plate dimensions of its site.

    ``Predictive(parallel=True)`` conditions on draws (S, D) in a plate of shape (S, 1), because it cannot know that D
    is an event dimension. Without the 1, the program would read draws as rows.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        shape = msg["fn"].shape()
        if msg["value"].shape != shape and msg["value"].numel() == shape.numel():
            msg["value"] = msg["value"].reshape(shape)
