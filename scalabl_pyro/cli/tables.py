"""Write a table in the form that the name of its file asks for."""

from collections.abc import Callable, Collection
from pathlib import Path

import pandas as pd

from ..storage.directories import replace_file

WRITE: dict[str, Callable[[pd.DataFrame], str | bytes]] = {
    ".csv": lambda frame: frame.to_csv(index=False),
    ".tsv": lambda frame: frame.to_csv(index=False, sep="\t"),
    ".parquet": lambda frame: frame.to_parquet(index=False),
    ".jsonl": lambda frame: frame.to_json(orient="records", lines=True, force_ascii=False),
}


def check_name(path: Path | None, endings: Collection[str], *, option: str = "--out") -> None:
    """Check the name of a file that is to be written, before the model runs.

    Args:
        path: The file; None for no file.
        endings: Endings that a name may have.
        option: Option of the command line that names the file.

    Raises:
        ValueError: It has another ending, or its folder does not exist.
    """
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ValueError(f"{option} {path}: the name must end in {' or '.join(endings)}.")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist.")


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table. A file of that name is replaced once the table is complete."""
    content = WRITE[path.suffix.lower()](frame)
    replace_file(path, content.encode() if isinstance(content, str) else content)
