"""Bridges to other tools, one package or module per tool. A tool is imported when its bridge is asked for.

Example:
    >>> from scalabl_pyro.integrations import ScalaBLClassifier
"""

import importlib
from typing import Any

#: Public names, and the module that each comes from.
_HOMES = {
    "make_app": "service",
    "serve": "service",
    "ScalaBLClassifier": "sklearn",
    "ScalaBLRegressor": "sklearn",
    "ElboLoss": "own_loop",
    "ScalaBLMixin": "trainer",
    "ScalaBLTrainer": "trainer",
}

__all__ = [
    "ElboLoss",
    "ScalaBLClassifier",
    "ScalaBLMixin",
    "ScalaBLRegressor",
    "ScalaBLTrainer",
    "make_app",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Import the bridge that defines a name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Public names."""
    return sorted(__all__)
