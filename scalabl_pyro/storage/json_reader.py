"""JSON from untrusted files: each key stands once, and the digits of integers and the depth of nesting are limited."""

import json
from typing import Any

MAX_DIGITS = 40
MAX_DEPTH = 32


def loads(content: bytes | str) -> Any:
    """Parse a JSON text.

    Args:
        content: The text, or its UTF-8 bytes.

    Raises:
        ValueError: The content is not UTF-8 or not JSON, repeats a key, or exceeds :data:`MAX_DIGITS` or
            :data:`MAX_DEPTH`.

    Example:
        >>> loads('{"step": 3}')
        {'step': 3}
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once, parse_int=_int)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    _check_depth(value)
    return value


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


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for inner in nested for v in inner]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
