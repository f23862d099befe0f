"""Errors raised inside a Pyro program, without the table that Pyro appends to their messages."""

from collections.abc import Iterator
from contextlib import contextmanager

#: Begins the table of Pyro.
TABLE = "\nTrace Shapes:"


@contextmanager
def without_trace_shapes() -> Iterator[None]:
    """Raise errors with the message that they were raised with.

    Pyro's tracer appends a table of all sites to the message of every ValueError and RuntimeError. Behind the message
    of this package, of a task or of the LLM it is noise. An error from inside Pyro, and a RuntimeError, which torch
    raises, keep it: there, the shapes often are the cause.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        first: BaseException = error
        while type(first.__cause__) is type(first) and str(first).startswith(f"{first.__cause__}{TABLE}"):
            first = first.__cause__
        package = _raised_in(first)
        is_in_words = package == "scalabl_pyro" or (isinstance(first, ValueError) and package not in ("pyro", "torch"))
        if first is error or not is_in_words:
            raise
        for note in getattr(error, "__notes__", ()):
            first.add_note(note)
        raise first from first.__cause__


def _raised_in(error: BaseException) -> str:
    """Name of the package whose code raised an error."""
    traceback, name = error.__traceback__, ""
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return name.partition(".")[0]
