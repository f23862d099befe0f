"""Words for user mistakes: what was given, what is allowed, and the nearest valid name."""

import difflib
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


def check_positive(**numbers: float) -> None:
    """Raise ValueError unless every number, named as the caller's option is, is positive and finite."""
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite.")


def check_choice(what: str, given: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless ``given`` is one of the ``allowed`` names."""
    allowed = list(allowed)
    if given not in allowed:
        raise ValueError(f"{what}={given!r} is unknown. {nearest(str(given), allowed)}")
