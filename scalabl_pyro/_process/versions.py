"""Versions of Python and of the libraries that decide the numbers."""

import platform

import peft
import pyro
import torch
import transformers

from .. import _version


def versions() -> dict[str, str]:
    """Return the versions, by name."""
    return {
        "scalabl_pyro": _version.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
