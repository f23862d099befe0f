"""JSON as every reader understands it: each key once, no number of endless digits, no endless nesting."""

import json
from typing import Any

MAX_DIGITS = 40
MAX_DEPTH = 32


def loads(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, or beyond what is said above.
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
        if key in found:  # two readers could see different things
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for inner in nested for v in inner]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
