"""Randomness enters as a seed and leaves no mark on the global generators."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .lock import LOCK


def derive_seed(seed: int, purpose: str) -> int:
    """Derive the seed of one random stream from the seed of a whole call.

    Streams that start from one integer are copies of each other: initial scales would follow the noise. Derived seeds
    give each purpose a stream of its own.

    Args:
        seed: Seed that the user gave.
        purpose: Name of the stream, such as ``"noise"``.

    Returns:
        A whole number below 2**48: the first bytes of a SHA-256 sum, so that streams are independent in practice.

    Raises:
        TypeError: ``seed`` is not an integer.

    Example:
        >>> derive_seed(0, "noise") == derive_seed(0, "initial scales")
        False
    """
    _check_seed(seed)
    return int.from_bytes(hashlib.sha256(f"{purpose}: {int(seed)}".encode()).digest()[:6], "big")


class Stream:
    """Random numbers from one seed, drawn in pieces from torch's global generators (CPU, and GPUs in use).

    Args:
        seed: of the first piece; each later one goes on where the piece before it ended.
        gpus: whether the generators of GPUs take part.
    """

    def __init__(self, seed: int, *, gpus: bool = True) -> None:
        _check_seed(seed)
        self.seed = seed
        self.gpus = gpus
        self._states: dict[str, Tensor] = {}

    @contextmanager
    def use(self) -> Iterator[None]:
        """The next piece: no other thread uses the generators meanwhile, and they are as before afterwards."""
        with LOCK:
            generators = {name: g for name, g in _generators().items() if self.gpus or name == "cpu"}
            before = {name: generator.get_state() for name, generator in generators.items()}
            try:
                for name, generator in generators.items():
                    if name in self._states:
                        generator.set_state(self._states[name])
                    else:
                        generator.manual_seed(self.seed)
                yield
                self._states = {name: generator.get_state() for name, generator in generators.items()}
            finally:
                for name, generator in generators.items():
                    generator.set_state(before[name])


@contextmanager
def scoped_seed(seed: int, *, gpus: bool = True) -> Iterator[None]:
    """Seed torch's global generators (CPU, and GPUs in use) inside the context, and put them back after it."""
    with Stream(seed, gpus=gpus).use():
        yield


def generator_states() -> dict[str, Tensor]:
    """States of torch's global generators by name: ``cpu``, and ``cuda.<index>`` of GPUs in use."""
    return {name: generator.get_state() for name, generator in _generators().items()}


def set_generator_states(states: Mapping[str, Tensor]) -> list[str]:
    """Put states back; the names of those that this machine has no generator for, or no state, come back."""
    generators = _generators()
    for name in set(states) & set(generators):
        generators[name].set_state(states[name])
    return sorted(set(states) ^ set(generators))


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed={seed!r}: expected an integer.")


def _generators() -> dict[str, torch.Generator]:
    generators = {"cpu": torch.default_generator}
    if torch.cuda.is_initialized():
        generators |= {f"cuda.{i}": generator for i, generator in enumerate(torch.cuda.default_generators)}
    return generators
