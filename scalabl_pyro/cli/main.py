"""``python -m scalabl_pyro``: the command line. The one place of the package that writes to the terminal."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .._version import __version__
from .doctor import examine_installation, examine_posterior


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if something is wrong, 2 for arguments that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m scalabl_pyro", description="Bayesian LoRA as a Pyro program.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = commands.add_parser("doctor", help="say what is wrong with an installation, or with a saved posterior")
    doctor.add_argument("path", nargs="?", type=Path, help="directory of a saved posterior; default: the installation")
    doctor.add_argument("--model", help="hub name or directory of the base model, to compare the posterior with")
    given = parser.parse_args(arguments)
    if given.model is not None and given.path is None:
        parser.error("--model compares a posterior with its base model: give the path of the posterior too")
    return _doctor(given.path, given.model)


def _doctor(path: Path | None, model: str | None) -> int:
    logging.getLogger("transformers").setLevel(logging.ERROR)  # what it has to say is in the findings
    problems = 0
    for finding in examine_installation() if path is None else examine_posterior(path, model):
        problems += not finding.ok
        say(str(finding))
    say(f"\n{problems} problem{'' if problems == 1 else 's'} found." if problems else "\nAll is well.")
    return 1 if problems else 0


def say(text: str) -> None:
    """Write lines to the terminal; of names in a stranger's files only what prints, no control sequences."""
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
    sys.stdout.write(
        clean.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8") + "\n"
    )
    sys.stdout.flush()
