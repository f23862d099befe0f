"""Words for user mistakes: what was given, what is allowed, and the nearest valid name."""

import difflib
import numbers
from collections.abc import Iterable


class ScalaBLWarning(UserWarning):
    """Something works, but probably not the way the user meant it."""


def nearest(name: str, allowed: Iterable[str], *, limit: int = 3) -> str:
    """A hint such as ``Did you mean 'q_proj', 'k_proj'?``, or what exists when nothing is near."""
    allowed = sorted(set(allowed))
    hits = difflib.get_close_matches(name, allowed, n=limit, cutoff=0.5)
    if hits:
        return "Did you mean " + ", ".join(map(repr, hits)) + "?"
    shown = ", ".join(map(repr, allowed[:10])) + (", ..." if len(allowed) > 10 else "")
    return f"Known names: {shown}."


def check_positive(**values: float) -> None:
    """Raise ValueError unless every number, named as the caller's option is, is positive and finite."""
    for name, value in values.items():
        if not _is_number(value) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r} must be positive and finite.")


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless every number, named as the caller's option is, is 0 or more and finite."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} must be a finite number, 0 or more.")


def check_count(*, least: int = 1, **values: int) -> None:
    """Raise ValueError unless every number, named as the caller's option is, is a whole number from ``least`` on."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_choice(what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless ``given`` is one of the ``allowed`` names."""
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(f"{what}={given!r} is unknown. {nearest(str(given), allowed)}")
