"""One line of a diagnosis."""

from dataclasses import dataclass

#: Longest text that is shown, in characters.
MAX_SHOWN = 600


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Texts may come from the files of a stranger. So the line shows control characters, also ends of lines, as escapes,
    and cuts long texts: a file cannot write lines of its own into the output.

    Attributes:
        ok: Whether the check passed.
        text: What was found.
        advice: What to do about a problem.

    Example:
        >>> str(Finding(True, "device cpu, 2 threads"))
        'ok       device cpu, 2 threads'
    """

    ok: bool
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = "ok     " if self.ok else "PROBLEM"
        return f"{mark}  {escaped(self.text)}" + (f"\n         -> {escaped(self.advice)}" if self.advice else "")


def escaped(text: str, *, limit: int = MAX_SHOWN) -> str:
    r"""Return a text as one line of printable characters.

    Example:
        >>> print(escaped("a\nok  b"))
        a\nok  b
    """
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
