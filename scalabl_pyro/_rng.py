"""Randomness enters as a seed and leaves no mark on the global generators."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def scoped_seed(seed: int, *, gpus: bool = True) -> Iterator[None]:
    """Seed torch's global generators (CPU, and GPUs in use) inside the context, and put them back after it."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: expected an integer.")
    generators = [g for name, g in _generators().items() if gpus or name == "cpu"]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def generator_states() -> dict[str, Tensor]:
    """States of torch's global generators by name: ``cpu``, and ``cuda.<index>`` of GPUs in use."""
    return {name: generator.get_state() for name, generator in _generators().items()}


def set_generator_states(states: Mapping[str, Tensor]) -> list[str]:
    """Put states back; the names of those that this machine has no generator for, or no state, come back."""
    generators = _generators()
    for name in set(states) & set(generators):
        generators[name].set_state(states[name])
    return sorted(set(states) ^ set(generators))


def _generators() -> dict[str, torch.Generator]:
    generators = {"cpu": torch.default_generator}
    if torch.cuda.is_initialized():
        generators |= {f"cuda.{i}": generator for i, generator in enumerate(torch.cuda.default_generators)}
    return generators
