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
        >>> print(Finding(False, "scipy is not installed", "pip install scipy"))
        PROBLEM  scipy is not installed
                 -> pip install scipy
    """

    ok: bool
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = "ok     " if self.ok else "PROBLEM"
        return f"{mark}  {self.text}" + (f"\n         -> {self.advice}" if self.advice else "")
