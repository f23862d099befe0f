"""The command ``python -m scalabl_pyro``. Only this file of the package writes to the terminal."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .._version import __version__
from .check_installation import examine_installation
from .check_posterior import examine_posterior
from .finding import Finding


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after ``python -m scalabl_pyro``; by default those of the process.

    Returns:
        Exit status: 0 if no problem was found, 1 otherwise. Invalid arguments end the process with status 2.

    Example:
        >>> main(["doctor", "my_posterior"])
        0
    """
    parser = argparse.ArgumentParser(prog="python -m scalabl_pyro", description="Bayesian LoRA as a Pyro program.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser("doctor", help="check the installation, or a saved posterior")
    doctor.add_argument(
        "path", nargs="?", type=Path, help="directory of a saved posterior; without it, the installation is checked"
    )
    doctor.add_argument("--model", help="hub name or directory of the base model that the posterior is compared with")
    given = parser.parse_args(arguments)
    if given.model is not None and given.path is None:
        parser.error("--model compares a posterior with its base model, so the path of a posterior is needed too")
    return _doctor(given.path, given.model)


def _doctor(path: Path | None, model: str | None) -> int:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # the findings hold its messages
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


def say(text: str) -> None:
    """Write a text to the terminal. Unprintable characters, as names in untrusted files may hold, become ``?``."""
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(clean.encode(encoding, "replace").decode(encoding) + "\n")
    sys.stdout.flush()
