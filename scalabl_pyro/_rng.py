"""Randomness enters as a seed and leaves no mark on the global generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def scoped_seed(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed the generators of the CPU and of ``device`` inside the context, and put them back after it.

    (``torch.manual_seed`` would also reseed every GPU that the caller uses for something else.)
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: expected an integer.")
    device = torch.device(device)
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
