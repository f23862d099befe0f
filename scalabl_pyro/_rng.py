"""Randomness enters as a seed and leaves no mark on the global generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ._lock import LOCK


class Stream:
    """Random numbers from one seed, drawn in pieces from torch's global generators (CPU, and GPUs in use).

    Args:
        seed: of the first piece; each later one goes on where the piece before it ended.
    """

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed={seed!r}: expected an integer.")
        self.seed = seed
        self._states: list[Tensor] = []

    @contextmanager
    def use(self) -> Iterator[None]:
        """The next piece: no other thread uses the generators meanwhile, and they are as before afterwards."""
        with LOCK:
            generators = [torch.default_generator]
            if torch.cuda.is_initialized():
                generators += torch.cuda.default_generators
            before = [generator.get_state() for generator in generators]
            try:
                for i, generator in enumerate(generators):
                    if i < len(self._states):
                        generator.set_state(self._states[i])
                    else:
                        generator.manual_seed(self.seed)
                yield
                self._states = [generator.get_state() for generator in generators]
            finally:
                for generator, state in zip(generators, before, strict=True):
                    generator.set_state(state)


@contextmanager
def scoped_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the context, and put them back after it."""
    with Stream(seed).use():
        yield
