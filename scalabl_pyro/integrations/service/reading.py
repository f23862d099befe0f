"""Reads requests: bytes up to a limit, strict JSON, known fields, rows up to a limit."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..._errors import describe, nearest
from ...storage import json_reader
from .limits import Limits, Refused

#: Longest message to a client, in characters. A message may show a part of the request.
MAX_MESSAGE = 600
#: A path of this machine: at least one folder and a name below the root, or a drive of Windows.
PATH = re.compile(r"(?<![\w/:.])/(?:[^\s/'\"]+/)+[^\s'\",:;]*|\b[A-Za-z]:\\[^\s'\"]+")


async def read_body(request: Any, limits: Limits) -> bytes:
    """Read the body of a request, and stop as soon as it is too large.

    Args:
        request: Request of Starlette.
        limits: Limits of the service.

    Raises:
        Refused: The body is too large (413), or it is not declared as JSON (415).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site could send other kinds without being asked
        raise Refused(415, "Send JSON, with the header 'Content-Type: application/json'.")
    length = request.headers.get("content-length", "")
    body = bytearray()
    too_large = Refused(413, f"The request has more than {limits.max_bytes:,} bytes: send fewer or shorter rows.")
    if length.isdecimal() and len(length) < 20 and int(length) > limits.max_bytes:
        raise too_large
    async for part in request.stream():
        body += part
        if len(body) > limits.max_bytes:
            raise too_large
    return bytes(body)


def parse(body: bytes, known: Iterable[str]) -> dict[str, Any]:
    """Parse the body of a request.

    Args:
        body: The bytes.
        known: Fields that a request may have. The first one is required.

    Raises:
        Refused: The body is not strict JSON, not an object, or it has another field (422).
    """
    first, *_ = known = list(known)
    try:
        found = json_reader.loads(body)
    except ValueError as error:
        raise Refused(422, f"The request is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise Refused(422, f'The request is {describe(found)}: send an object such as {{"{first}": [...]}}.')
    if unknown := [name for name in found if name not in known]:
        raise Refused(422, f"The request has an unknown field {unknown[0]!r}. {nearest(unknown[0], known)}")
    if first not in found:
        raise Refused(422, f'The request lacks the field {first!r}: send an object such as {{"{first}": [...]}}.')
    if any(isinstance(value, float) and not math.isfinite(value) for value in _values(found)):
        raise Refused(422, "The request has NaN or Infinity, which are not JSON: write null for a missing number.")
    return found


def check_items(items: Any, name: str, limits: Limits) -> list[Any]:
    """Check that a field holds a list of items within the limits.

    Args:
        items: Value of the field.
        name: Name of the field.
        limits: Limits of the service.

    Raises:
        Refused: It is not a list, or it is empty (422); it has too many items, or one is too long (413).
    """
    if not isinstance(items, list):
        raise Refused(422, f"{name!r} is {describe(items)}, expected a list, one item per row.")
    if not items:
        raise Refused(422, f"{name!r} is empty: send one item or more.")
    if len(items) > limits.max_rows:
        raise Refused(
            413, f"{name!r} has {len(items)} items. At most {limits.max_rows} are allowed: send several requests."
        )
    for i, item in enumerate(items):
        count = sum(len(value) for value in _values(item) if isinstance(value, str))
        if count > limits.max_chars:
            raise Refused(
                413, f"Row {i} has {count:,} characters. At most {limits.max_chars:,} are allowed: shorten its texts."
            )
    return items


def safe(message: str, body: bytes = b"") -> str:
    """Return a message without paths of this machine, and not too long.

    Args:
        message: Message that may come from any library.
        body: The request. Paths in it are those of the client, so they stay.

    Example:
        >>> safe("cannot read /srv/models/config.json")
        'cannot read (a path)'
    """
    given = body.decode("utf-8", "replace")
    message = PATH.sub(lambda found: found[0] if found[0] in given else "(a path)", message)
    return message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 3]}..."


def _values(value: Any) -> Iterator[Any]:
    """Yield all keys and all values of a JSON value that are not containers. The depth is limited by the reader."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)
    else:
        yield value
