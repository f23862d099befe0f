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
print(json.dumps(sorted(set(sys.modules) - brought)))
"""


def test_an_import_brings_no_library_that_it_does_not_use():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    brought = set(json.loads(run.stdout))
    assert "scalabl_pyro.posterior.posterior" in brought and "pyro" in brought
    assert not brought & set(LATER)


@pytest.mark.parametrize("name", ["baselines", "conformal", "plots"])
def test_a_namespace_that_comes_later_is_there_when_it_is_asked_for(name):
    program = f"import scalabl_pyro as sp; assert '{name}' in dir(sp); print(sp.{name}.__name__)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"scalabl_pyro.{name}"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'scalabl_pyro' has no attribute 'plot'"):
        sp.plot  # noqa: B018
