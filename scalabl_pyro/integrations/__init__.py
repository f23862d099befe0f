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
    "ScalaBLMixin": "trainer",
    "ScalaBLTrainer": "trainer",
}

__all__ = [
    "ScalaBLClassifier",
    "ScalaBLMixin",
    "ScalaBLRegressor",
    "ScalaBLTrainer",
    "make_app",
    "serve",
]
