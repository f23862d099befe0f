"""Checks that several processes still hold the same parameters: each one updates its own copy."""

import hashlib
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from ..distributed.processes import Processes
from .messages import short_name
from .training_state import LearnedState


def check_alike(processes: Processes, learned: LearnedState) -> None:
    """Compare a hash of each trained parameter and of its moments in all processes.

    Processes on different kinds of hardware are not compared, because they round differently.

    Args:
        processes: Processes that train together.
        learned: What this process has learned.

    Raises:
        ValueError: A process holds other numbers. The message names the process and the tensor.
    """
    if not processes.are_several or not processes.have_same_hardware:
        return
    found = processes.all_gather(lambda: {name: _digest(tensor) for name, tensor in learned.trained().items()})
    for name in found[0]:
        digests = [other.get(name) for other in found]
        usual, count = Counter(digests).most_common(1)[0]
        if count == len(digests):
            continue
        usual = usual if count > len(digests) / 2 else digests[0]
        odd = [rank for rank, digest in enumerate(digests) if digest != usual]
        holder = f"process {digests.index(usual)}"
        raise ValueError(
            f"Process {', '.join(map(str, odd))} holds other numbers than {holder} in {short_name(name)!r}. All "
            "processes make the same updates, so code in one of them has changed its copy: change a parameter in all "
            "processes alike, or in none. No checkpoint of this step was written."
        )


def _digest(tensor: Tensor) -> bytes:
    values: Any = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values).digest()[:16]
