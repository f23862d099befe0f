"""Errors for user mistakes: what was given, what is allowed, and the nearest valid name."""

import difflib
import inspect
import numbers
import os
from collections.abc import Iterable

#: Longest value that a message shows, in characters. Errors may be logged, and a long text may be confidential.
MAX_SHOWN = 60
#: Smallest and largest scale that float32 can square.
SCALES = (1e-18, 1e18)
#: Longest name that is compared with the valid names, in characters.
MAX_COMPARED = 300


class MissingFieldError(ValueError):
    """A row lacks a field that its task reads."""


class MissingValueError(ValueError):
    """A field that a task reads has no value.

    Attributes:
        name: Name of the field.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class ScalaBLWarning(UserWarning):
    """Warns that something works, but probably not the way the user meant it."""


def stacklevel_outside() -> int:
    """Return the ``stacklevel`` of ``warnings.warn`` that names the user's line: the one that called this package.

    Frames of other libraries may stand between those of this package, such as a decorator of torch.

    Example:
        >>> warnings.warn("Few rows.", ScalaBLWarning, stacklevel=stacklevel_outside())
    """
    package = __name__.partition(".")[0]
    names = [caller.frame.f_globals.get("__name__", "") for caller in inspect.stack(context=0)]
    return 1 + max(i for i, name in enumerate(names) if name.partition(".")[0] == package)


def nearest(name: str, allowed: Iterable[str], *, limit: int = 3) -> str:
    """Suggest names near a wrong one.

    Args:
        name: The wrong name.
        allowed: The valid names.
        limit: Largest number of suggestions.

    Returns:
        A sentence such as ``Did you mean 'q_proj', 'k_proj'?``, or the valid names if none is near.

    Example:
        >>> nearest("norml", ["normal", "delta"])
        "Did you mean 'normal'?"
    """
    allowed = sorted(set(allowed))
    # A very long text, as in a file of a stranger, is near no name, and comparing it would take long.
    hits = difflib.get_close_matches(name, allowed, n=limit, cutoff=0.5) if len(name) <= MAX_COMPARED else []
    if hits:
        return "Did you mean " + ", ".join(map(repr, hits)) + "?"
    shown = ", ".join(map(repr, allowed[:10])) + (", ..." if len(allowed) > 10 else "")
    return f"Known names: {shown}." if allowed else "There are no names at all."


def check_positive(**values: float) -> None:
    """Check that numbers are positive and finite.

    Args:
        values: Numbers, named as the options of the caller.

    Raises:
        ValueError: A number is not.
    """
    for name, value in values.items():
        if not is_number(value) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r} must be positive and finite.{_about_text(value)}")


def check_scale(**values: float) -> None:
    """Check that numbers are positive, and that float32 can hold their squares and the inverses of these.

    Args:
        values: Numbers, named as the options of the caller.

    Raises:
        ValueError: A number is not.
    """
    check_positive(**values)
    for name, value in values.items():
        if not SCALES[0] <= value <= SCALES[1]:
            raise ValueError(
                f"{name}={value!r} must lie between {SCALES[0]:.0e} and {SCALES[1]:.0e}, because float32 must hold "
                "its square."
            )


def check_share(**values: float) -> None:
    """Check that numbers are shares of the steps, from 0 to 1.

    Args:
        values: Numbers, named as the options of the caller.

    Raises:
        ValueError: A number is not.
    """
    for name, value in values.items():
        if not is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r} must lie between 0 and 1: it is a share of the steps.")


def check_not_negative(**values: float) -> None:
    """Check that numbers are finite, and 0 or more.

    Args:
        values: Numbers, named as the options of the caller.

    Raises:
        ValueError: A number is not.
    """
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} must be a finite number, 0 or more.{_about_text(value)}")


def check_count(*, least: int = 1, **values: int) -> None:
    """Check that numbers are whole numbers from ``least`` on.

    Args:
        least: Smallest number allowed.
        values: Numbers, named as the options of the caller.

    Raises:
        ValueError: A number is not.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.{_about_text(value)}")


def _about_text(value: object) -> str:
    """Name the cause of a number that arrives as a text."""
    is_exponential = isinstance(value, str) and "e" in value.lower()
    return " It is a text. YAML reads 1e-3 as a text, and 1.0e-3 as a number." if is_exponential else ""


def check_flag(**values: object) -> None:
    """Check that options are True or False. Words such as "no" are refused, because Python takes them for True.

    Args:
        values: Options, named as those of the caller.

    Raises:
        TypeError: An option is neither.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected True or False.")


def check_auto_flag(**values: object) -> None:
    """Check that options are True, False or ``"auto"``.

    Args:
        values: Options, named as those of the caller.

    Raises:
        ValueError: An option is something else.
    """
    for name, value in values.items():
        if not isinstance(value, bool) and not (isinstance(value, str) and value == "auto"):
            raise ValueError(f"{name}={value!r}: expected True, False or 'auto'.")


def is_number(value: object) -> bool:
    """Tell whether a value is a real number of Python or NumPy. True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_choice(what: str, given: object, allowed: Iterable[str]) -> None:
    """Check that an option is one of the allowed words.

    Args:
        what: Name of the option.
        given: Its value.
        allowed: The valid words.

    Raises:
        ValueError: It is another value; the message suggests a word near it.
    """
    allowed = list(allowed)
    if not isinstance(given, str) or given not in allowed:
        shown = repr(given)
        shown = shown if len(shown) <= MAX_COMPARED else f"{shown[:MAX_SHOWN]}..."  # a file of a stranger may be long
        raise ValueError(f"{what}={shown} is unknown. {nearest(str(given), allowed)}")


def describe(value: object) -> str:
    """Say what an object is: its type, and the start of its value if that is short.

    Args:
        value: Any object.

    Example:
        >>> describe("gpt2"), describe(["a", "b"]), describe(int)
        ("a str ('gpt2')", 'a list of 2 str', 'the class int')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    name = type(value).__name__
    text = f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
    if isinstance(value, str | bytes | numbers.Number | os.PathLike):
        shown = repr(value)
        return f"{text} ({shown if len(shown) <= MAX_SHOWN else f'{shown[:MAX_SHOWN]}...'})"
    if isinstance(value, list | tuple):
        inner = {type(item).__name__ for item in value} or {"objects"}
        return f"{text} of {len(value)} {inner.pop() if len(inner) == 1 else 'objects'}"
    return text
