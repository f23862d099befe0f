"""Randomness enters as a seed and leaves no mark on the global generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def scoped_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators (CPU, and GPUs in use) inside the context, and put them back after it."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: expected an integer.")
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
