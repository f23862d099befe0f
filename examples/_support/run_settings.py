"""The settings of a run, kept beside its tables so that lines made with other settings are never mixed in."""

import argparse
import json
from pathlib import Path

import pandas as pd

import scalabl_pyro as sp


def settings_of(args: argparse.Namespace) -> dict:
    """Collect the command line, without the output folder and the seeds, and the version of the library."""
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "seeds")} | {"version": sp.__version__}
    return json.loads(json.dumps(settings, default=lambda path: path.name))


def save_settings(args: argparse.Namespace, path: Path) -> None:
    """Write :func:`settings_of` to a JSON file."""
    path.write_text(json.dumps(settings_of(args), indent=1) + "\n", encoding="utf-8")


def earlier_lines(args: argparse.Namespace, table: Path, settings: Path) -> list[dict]:
    """Read the lines of an earlier run with the same settings.

    Returns:
        The lines; an empty list if there was no earlier run.
    """
    if not table.exists():
        return []
    if json.loads(settings.read_text(encoding="utf-8")) != settings_of(args):
        raise SystemExit(f"{table} was made with other settings, see {settings}: choose another --out, or remove both.")
    return pd.read_csv(table).to_dict("records")
