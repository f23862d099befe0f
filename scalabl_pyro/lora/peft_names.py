"""What this library reads of a PEFT configuration, and which warnings of PEFT do not concern it."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


def method_of(config: Any) -> str:
    """Return the method of a PEFT configuration, such as ``"LORA"``."""
    kind = getattr(config, "peft_type", "LORA")
    return str(getattr(kind, "value", kind))


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide two warnings of PEFT.

    One configuration serves ``Conv1D`` and ``Linear`` layers (``fan_in_fan_out``), which PEFT sorts out by itself. Tied
    heads matter for merging only, and this library unties them before it merges.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        yield


def and_more(names: Collection[Any]) -> str:
    """Return the end of a message that names the first of several tensors."""
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
