"""The command ``doctor``: check an installation or a saved posterior."""

from collections.abc import Iterator
from pathlib import Path

from .check_installation import examine_installation
from .check_posterior import examine_posterior
from .finding import Finding
from .terminal import say


def doctor(path: Path | None, model: str | None) -> int:
    """Print what was found.

    Args:
        path: Directory of a saved posterior; None checks the installation.
        model: Hub name or directory of the base model that the posterior is compared with.

    Returns:
        0 if no problem was found, else 1.
    """
    problems = 0
    for finding in _whole(examine_installation() if path is None else examine_posterior(path, model)):
        problems += not finding.ok
        say(str(finding))
    say(f"\n{problems} problem{'' if problems == 1 else 's'} found." if problems else "\nNo problems found.")
    return 1 if problems else 0


def _whole(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the findings; an error in a check becomes the last one."""
    try:
        yield from findings
    except Exception as error:  # files of strangers may break a check in any way
        text = f"the check ended with {type(error).__name__}: {error}"
        yield Finding(False, text, "do not use these files, and report this problem")
