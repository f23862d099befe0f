"""Random streams that start from a seed and leave torch's global generators as they were."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._values import plain
from .forked_child import undone_in_child
from .lock import LOCK


def derive_seed(seed: int, purpose: str) -> int:
    """Derive the seed of one random stream from the seed of a whole call.

    Streams that start from one integer are copies of each other: initial scales would follow the noise. Derived seeds
    give each purpose a stream of its own.

    Args:
        seed: Seed that the caller gave.
        purpose: Name of the stream, such as ``"noise"``.

    Returns:
        63-bit integer: the first bits of the SHA-256 of purpose and seed.

    Raises:
        TypeError: ``seed`` is not an integer.

    Example:
        >>> derive_seed(0, "noise") == derive_seed(0, "initial scales")
        False
    """
    seed = as_seed(seed)
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Stream:
    """Random numbers from one seed, drawn in pieces from torch's global generators (CPU, and GPUs in use).

    Args:
        seed: Seed of the first piece. Each later piece continues where the one before it ended.
        gpus: Whether the generators of GPUs take part.
    """

    def __init__(self, seed: int, *, gpus: bool = True) -> None:
        self.seed = as_seed(seed)
        self.gpus = gpus
        self._states: dict[str, Tensor] = {}

    @contextmanager
    def use(self) -> Iterator[None]:
        """Draw the next piece inside the context.

        No other thread of the package uses the generators meanwhile. Afterwards they are as before. A piece that ends
        with an exception does not count: the next one starts where it started.
        """
        with LOCK:
            generators = {name: g for name, g in _generators().items() if self.gpus or name == "cpu"}
            before = {name: generator.get_state() for name, generator in generators.items()}
            undo = partial(torch.set_rng_state, before["cpu"])  # a forked child cannot use GPUs
            try:
                with undone_in_child(undo):
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

    def states(self) -> dict[str, Tensor]:
        """States of the generators at the start of the next piece: ``cpu``, and ``cuda.<index>`` of GPUs in use."""
        if not self._states:
            with self.use():
                pass
        return dict(self._states)

    def load_states(self, states: Mapping[str, Tensor]) -> list[str]:
        """Continue from saved states.

        Args:
            states: States by name, as :meth:`states` gives them.

        Returns:
            Names of generators without a saved state, and of saved states without a generator on this machine.

        Raises:
            RuntimeError: A tensor is not a state of its generator.
            TypeError: A tensor has another type than a state.
        """
        with self.use():
            return set_generator_states(states)


@contextmanager
def scoped_seed(seed: int, *, gpus: bool = True) -> Iterator[None]:
    """Seed torch's global generators (CPU, and GPUs in use) inside the context, and put them back after it."""
    with Stream(seed, gpus=gpus).use():
        yield


def generator_states() -> dict[str, Tensor]:
    """Return the states of torch's global generators, by name."""
    return {name: generator.get_state() for name, generator in _generators().items()}


def set_generator_states(states: Mapping[str, Tensor]) -> list[str]:
    """Set the states of torch's global generators.

    Returns:
        Names that only one side has: the saved states, or the generators of this machine.
    """
    generators = _generators()
    for name in set(states) & set(generators):
        generators[name].set_state(states[name])
    return sorted(set(states) ^ set(generators))


def as_seed(seed: Any) -> int:
    """Return a seed as an int.

    Args:
        seed: A Python, NumPy or torch integer.

    Raises:
        TypeError: It is something else.
        ValueError: It has more than 64 bits.

    Example:
        >>> as_seed(3)
        3
    """
    value = plain(seed)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"seed={seed!r}: expected an integer, such as seed=0.")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed={seed!r}: expected an integer of at most 64 bits (-2**63 to 2**63 - 1).")
    return value


def _generators() -> dict[str, torch.Generator]:
    generators = {"cpu": torch.default_generator}
    if torch.cuda.is_initialized():
        generators |= {f"cuda.{i}": generator for i, generator in enumerate(torch.cuda.default_generators)}
    return generators
