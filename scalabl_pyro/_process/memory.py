"""Memory that is free on this machine, and the check that a large request fits into it."""

from collections.abc import Iterator
from pathlib import Path

import psutil

#: Folders in which Linux tells the limits of a container: for control groups of version 2, then of version 1.
GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Return the bytes of memory that this process can still take without swapping.

    This is what the system reports as available, or what is left of the limit of a container, if this is less.
    """
    return min([psutil.virtual_memory().available, *_left_in_container()])


def check_memory(what: str, needed: int, advice: str) -> None:
    """Check that the results of a call fit into memory, before any of them is computed.

    Args:
        what: What takes the memory, such as ``"100 draws of 1000 numbers"``.
        needed: Bytes that it takes.
        advice: What to do, as a sentence.

    Raises:
        ValueError: If more is needed than is available.

    Example:
        >>> check_memory("3 numbers", 24, "Ask for fewer.")
    """
    available = available_memory()
    if needed > available:
        raise ValueError(
            f"{what} would take {_shown(needed)} of memory, and {_shown(available)} are available. Nothing was "
            f"computed. {advice}"
        )


def _shown(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB ({count:,} bytes)"


def _left_in_container() -> Iterator[int]:
    """What is left of the limits of the container, if there is one; files that the system keeps in memory are free."""
    for folder, limit, used in GROUPS:
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or the limit is the word "max"
            continue
        yield max(left + int(entries.get("inactive_file", 0)), 0)
