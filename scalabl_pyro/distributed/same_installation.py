"""Checks that all processes run the same versions of the libraries: with others, the numbers differ in silence."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

#: Libraries that must have one version in all processes.
LIBRARIES = ("scalabl_pyro", "torch", "pyro", "transformers", "peft")


def check_versions(found: Sequence[Mapping[str, str]]) -> None:
    """Check that all processes run the same versions of :data:`LIBRARIES`.

    Args:
        found: Versions by name, of each process in the order of ranks.

    Raises:
        ValueError: They do not. The message names versions and processes.

    Example:
        >>> check_versions([{"torch": "2.12.0"}, {"torch": "2.13.0"}])
        Traceback (most recent call last):
        ValueError: The processes run different versions: torch 2.12.0 in process 0, torch 2.13.0 in process 1. ...
    """
    differing = []
    for name in LIBRARIES:
        ranks = defaultdict(list)
        for rank, versions in enumerate(found):
            ranks[versions.get(name, "(unknown)")].append(rank)
        if len(ranks) > 1:
            differing += [f"{name} {version} in {_named(held)}" for version, held in ranks.items()]
    if differing:
        raise ValueError(
            f"The processes run different versions: {', '.join(differing)}. Install the same versions for all of them."
        )


def hardware() -> str:
    """Name what decides the rounding in this process: the instructions of the CPU, and the GPU if one is in use."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "no GPU"
    return f"{torch.backends.cpu.get_cpu_capability()}, {gpu}"


def _named(ranks: Sequence[int]) -> str:
    return ("process " if len(ranks) == 1 else "processes ") + ", ".join(map(str, ranks))
