"""What the command line writes to the terminal. Only this file of the package does so."""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from .._errors import ScalaBLWarning
from ..storage.json_values import json_value


def say(text: str, *, file: TextIO | None = None) -> None:
    """Write a text to the terminal. Unprintable characters, as names in untrusted files may hold, become ``?``.

    Args:
        text: The text.
        file: Where it goes; by default to the standard output.
    """
    out = sys.stdout if file is None else file
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    encoding = out.encoding or "utf-8"
    out.write(clean.encode(encoding, "replace").decode(encoding) + "\n")
    out.flush()


def say_json(values: Any) -> None:
    """Write values as one JSON document to the standard output. NaN becomes null.

    Characters that the terminal cannot show are written as JSON escapes them, so no text is changed.
    """
    encoding = sys.stdout.encoding or "utf-8"
    text = json.dumps(json_value(values), indent=1, ensure_ascii=False)
    say("".join(c if c == "\n" or _can_show(c, encoding) else json.dumps(c)[1:-1] for c in text))


def _can_show(character: str, encoding: str) -> bool:
    return character.isprintable() and (character.isascii() or bool(character.encode(encoding, "ignore")))


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings of this package as one line that begins with "warning:", without a line of code."""
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, ScalaBLWarning):
                say(f"warning: {message}", file=sys.stderr)
            else:
                show_others(message, category, *place, **more)

        warnings.showwarning = show
        yield
