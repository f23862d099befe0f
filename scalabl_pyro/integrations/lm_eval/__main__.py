"""The command ``lm_eval`` with the model ``scalabl``: ``python -m scalabl_pyro.integrations.lm_eval run ...``."""

import importlib

from .registration import register

if __name__ == "__main__":
    register()
    importlib.import_module("lm_eval.__main__").cli_evaluate()
