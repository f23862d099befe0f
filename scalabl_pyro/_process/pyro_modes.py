"""The base class of all Pyro programs here: it supports both of Pyro's parameter modes, and keeps plates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, get_plates

from .._arguments import known_arguments
from .forked_child import undone_in_child
from .lock import LOCK

#: Settings of Pyro that the package changes for a time.
_MODES = (
    "module_local_params",
    "validate_distributions_pyro",
    "validate_distributions_torch",
    "validate_infer",
    "validate_poutine",
)


@contextmanager
def local_params() -> Iterator[None]:
    """Keep parameters in their modules and Pyro's global store empty. One thread at a time: the mode is global."""
    with LOCK, undone_in_child(_restore_pyro()), pyro.settings.context(module_local_params=True):
        yield


def _restore_pyro() -> Callable[[], None]:
    """Return a function that gives Pyro the handlers and modes that it has now."""
    handlers = list(_PYRO_STACK)
    modes = {name: pyro.settings.get(name) for name in _MODES}

    def restore() -> None:
        _PYRO_STACK[:] = handlers
        pyro.settings.set(**modes)

    return restore


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


#: Plates of Pyro's estimators that hold draws for all rows, not one draw per row.
PARTICLE_PLATES = ("num_particles_vectorized", "_num_predictive_samples")


def check_particle_dimension() -> None:
    """Check that vectorized particles do not lie in the dimension of the rows.

    Pyro puts its plate of particles left of all plates that it finds. If a model has no plate over its rows, particles
    take the place of the rows. With as many particles as rows, each row would get its own draw without an error.

    Raises:
        ValueError: They do.
    """
    for frame in get_plates():
        if frame.name in PARTICLE_PLATES and frame.dim == -1:
            raise ValueError(
                f"The {frame.size} draws of Pyro's plate {frame.name!r} lie in the dimension of the rows, because the "
                "model has no plate over its rows. Sample the answers in one: "
                "with pyro.plate('data', N, subsample_size=len(input_ids))."
            )
