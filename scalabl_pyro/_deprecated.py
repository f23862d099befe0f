"""Old names that keep working for one release, with a DeprecationWarning that says the new name."""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class ScalaBLDeprecationWarning(DeprecationWarning):
    """Warns of an old name of this package. The tests make it an error, so that the package uses none itself."""


def renamed_arguments(groups: Mapping[str, type] | None = None, /, **new_names: str) -> Callable[[Function], Function]:
    """Accept old names of keyword arguments.

    Args:
        groups: Dataclasses of arguments that hold several options, by the name of the argument.
        new_names: New name of each old name. A new name ``"optimizer.warmup"`` is the field ``warmup`` of the argument
            ``optimizer``.

    Returns:
        A decorator. The decorated function raises TypeError if a caller gives the old and the new name of one argument.

    Example:
        >>> @renamed_arguments(A_lr="lr_A")
        ... def train(*, lr_A):
        ...     return lr_A
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in [name for name in new_names if name in kwargs]:
                group, _, field = new_names[old].rpartition(".")
                if not group and field in kwargs:
                    raise TypeError(
                        f"{function.__name__}() got {old}= and {field}=: {old} is the old name, use {field}."
                    )
                value = kwargs.pop(old)
                if not group:
                    warnings.warn(f"{old}= is now called {field}=.", ScalaBLDeprecationWarning, stacklevel=2)
                    kwargs[field] = value
                    continue
                kind = (groups or {})[group]
                new = f"{group}={kind.__name__}({field}=...)"
                warnings.warn(f"{old}= is now given as {new}.", ScalaBLDeprecationWarning, stacklevel=2)
                kwargs[group] = _with_field(function.__name__, old, kwargs.get(group), kind, field, value)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _with_field(function: str, old: str, given: Any, kind: type, field: str, value: Any) -> Any:
    """The option group with one field set.

    Raises:
        TypeError: The caller has set that field in the group too.
    """
    if given is None:
        return kind(**{field: value})
    if isinstance(given, Mapping):
        unset, found = value, given.get(field, value)
    elif isinstance(given, kind):
        unset, found = {f.name: f.default for f in fields(kind)}[field], getattr(given, field)
    else:
        return given  # which the function itself refuses
    if found not in (unset, value):
        raise TypeError(f"{function}() got {old}= and {field} in {kind.__name__}: {old} is the old name, leave it out.")
    return {**given, field: value} if isinstance(given, Mapping) else replace(given, **{field: value})


def renamed_function(function: Function, old: str) -> Function:
    """Give a function its old name, which warns.

    Args:
        function: The function under its new name.
        old: The old name.

    Returns:
        A function that warns and calls ``function``.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{old}() is now called {function.__name__}().", ScalaBLDeprecationWarning, stacklevel=2)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
