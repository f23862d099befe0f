"""Old names that keep working for one release, with a DeprecationWarning that says the new name."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed_arguments(**new_names: str) -> Callable[[Function], Function]:
    """Accept old names of keyword arguments: ``@renamed_arguments(A_lr="lr_A")``.

    Raises:
        TypeError: the caller gives the old and the new name of one argument.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in new_names if name in kwargs]:
                new = new_names[old]
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() got {old}= and {new}=: {old} is the old name, use {new}.")
                warnings.warn(f"{old}= is now called {new}=.", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def renamed_function(function: Function, old: str) -> Function:
    """The function under its old name."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{old}() is now called {function.__name__}().", DeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
