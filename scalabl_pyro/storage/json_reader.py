"""JSON from untrusted files: each key stands once; values, digits and nesting are limited."""

import json
import math
import re
from typing import Any

MAX_DIGITS = 40
#: How JSON writes half of a character. Both halves of one may follow each other.
SURROGATE = re.compile(r"\\u[dD]")
MAX_DEPTH = 32
#: Largest number of values. A configuration of a model with 50,000 tensors has about 300,000.
MAX_VALUES = 2**19


def loads(content: bytes | str, *, max_values: int = MAX_VALUES) -> Any:
    """Parse a JSON text.

    Args:
        content: The text, or its UTF-8 bytes.
        max_values: Largest number of values, see :func:`check_values`.

    Raises:
        ValueError: The content is not UTF-8 or not JSON, repeats a key, exceeds ``max_values``, :data:`MAX_DIGITS` or
            :data:`MAX_DEPTH`, or holds a number beyond float64 or half a character (a lone surrogate).

    Example:
        >>> loads('{"step": 3}')
        {'step': 3}
    """
    check_values(content, max_values)
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once, parse_int=_int, parse_float=_float)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check_depth(value)
    if SURROGATE.search(text):
        _check_surrogates(value)
    return value


def check_values(content: bytes | str, max_values: int) -> None:
    """Check that a JSON text cannot hold more than so many values, before it is parsed.

    Each value of JSON after the first follows one of ``, { [``. These characters are counted, also those in texts.

    Raises:
        ValueError: There are more of them.
    """
    counts = [content.count(m) if isinstance(content, str) else content.count(m.encode()) for m in (",", "{", "[")]
    found = sum(counts)
    if found > max_values:
        raise ValueError(f"it has up to {found:,} values, more than the {max_values:,} that are allowed here")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:  # two programs could read different values
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, more than {MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):  # it is written as a finite number
        raise ValueError(f"the number {digits[:MAX_DIGITS]} is too large for 64 bits")
    return value


def _check_surrogates(value: Any) -> None:
    """Refuse texts that hold one half of a character: no file name, no terminal and no UTF-8 file can hold them."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise ValueError(f"a text holds half of a character, {half!r}; write both halves, or neither") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for inner in nested for v in inner]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
