"""One line of a diagnosis."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Result of one check.

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
        return f"{mark}  {self.text}" + (f"\n         -> {self.advice}" if self.advice else "")
