"""Fields of a row: a value, a text, or a list of texts, each checked with a message that names the field."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from .._errors import MissingFieldError, MissingValueError, nearest
from .._values import is_missing, shown, text
from ..data.rows import Row


def field_of(row: Row, name: str) -> Any:
    """Return a field that a row must have.

    Raises:
        ValueError: The field does not exist, or its value is missing.
    """
    if name not in row:
        raise MissingFieldError(f"the row has no field {name!r}. {nearest(name, map(str, row))}")
    if is_missing(row[name]):
        message = f"the field {name!r} has no value ({row[name]}): fill it, or leave the row out."
        raise MissingValueError(message, name)
    return row[name]


def text_of(row: Row, name: str) -> str:
    """Return the text in a field that a row must have.

    Raises:
        ValueError: The field does not exist, its value is missing, or it is not a text.
    """
    value = field_of(row, name)
    found = text(value)
    if found is None:
        raise ValueError(f"the field {name!r} holds {shown(value)}, which is not a text: give one str per row.")
    check_characters(found, name)
    return found


def check_characters(value: str, name: str) -> None:
    """Check that a text consists of whole characters. Half of a pair of surrogates is none, and no tokenizer reads it.

    Args:
        value: The text.
        name: Name of its field.

    Raises:
        ValueError: It contains half a character.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(value[error.start]):04X}"
        raise ValueError(
            f"the field {name!r} contains half a character, {half}, at place {error.start}. Read the file with the "
            "right encoding, or replace it: text.encode('utf-8', 'replace').decode()."
        ) from None


def texts_of(row: Row, name: str) -> list[str]:
    """Return the texts in a field that holds a list of them.

    Raises:
        ValueError: The field does not exist, or it is not a list of texts.
    """
    values = field_of(row, name)
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of texts, got a {type(values).__name__}.")
    values = list(values)
    if any(is_missing(value) for value in values):
        raise ValueError(f"{name}={values} contains a missing text (None or NaN): give a str in each place.")
    found = [text(value) for value in values]
    if wrong := [value for value, one in zip(values, found, strict=True) if one is None]:
        raise ValueError(f"{name} must be a list of texts, but it contains {shown(wrong[0])}.")
    texts = [one for one in found if one is not None]
    for one in texts:
        check_characters(one, name)
    return texts
