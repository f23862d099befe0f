"""Limits of a service, and the refusal of a request that exceeds one."""

from dataclasses import dataclass

from ..._errors import check_count, check_positive


class Refused(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status code.
        message: What was given, what is allowed and what to do. The client reads it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for, and how many requests may wait; see :func:`make_app` for the defaults.

    Attributes:
        max_rows: Largest number of rows per request. With several samples per prompt, each counts as a row.
        max_chars: Largest number of characters per row, the names of its fields included.
        max_bytes: Largest size of a request in bytes.
        max_queue: Largest number of requests at a time, the running ones included.
        max_new_tokens: Largest number of tokens of a text that is written.
        timeout: Seconds after which a request is given up.

    Raises:
        ValueError: A number is not positive, or not a whole number where it must be one.
    """

    max_rows: int
    max_chars: int
    max_bytes: int
    max_queue: int
    max_new_tokens: int
    timeout: float

    def __post_init__(self) -> None:
        check_count(max_rows=self.max_rows, max_chars=self.max_chars, max_bytes=self.max_bytes)
        check_count(max_queue=self.max_queue, max_new_tokens=self.max_new_tokens)
        check_positive(timeout=self.timeout)
