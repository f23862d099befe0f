"""A start imports what it uses: libraries for analysis, pictures and data sets come when they are asked for."""

import json
import subprocess
import sys

import pytest

import scalabl_pyro as sp

#: Libraries that an import of scalabl_pyro must not bring, and that nothing it needs brings.
LATER = "arviz arviz_stats datasets IPython matplotlib scipy.signal scipy.stats sklearn torchmetrics xarray".split()

PROGRAM = """
import json, sys
import peft
brought = set(sys.modules)
import scalabl_pyro
brought = sorted(set(sys.modules) - brought)
later = ["baselines", "conformal", "infer", "plots"]
print(json.dumps([brought, [name in dir(scalabl_pyro) for name in later],
                  [getattr(scalabl_pyro, name).__name__ for name in later]]))
"""


def test_an_import_brings_no_library_that_it_does_not_use():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    modules, listed, names = json.loads(run.stdout)
    brought = set(modules)
    assert "scalabl_pyro.posterior.posterior" in brought and "pyro" in brought
    assert not brought & set(LATER)
    # Namespaces that come later are there when they are asked for.
    assert all(listed) and names == [f"scalabl_pyro.{name}" for name in ("baselines", "conformal", "infer", "plots")]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'scalabl_pyro' has no attribute 'plot'"):
        sp.plot  # noqa: B018
