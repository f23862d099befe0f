"""Bridges to other tools, one module per tool. Nothing of a tool is imported before it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import ScalaBLMixin, ScalaBLTrainer

__all__ = ["ScalaBLMixin", "ScalaBLTrainer"]

#: Module of each name.
_MODULES = {"ScalaBLMixin": "trainer", "ScalaBLTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    """Import the module of a name when the name is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
