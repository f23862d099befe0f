"""What several tests of the documentation share."""

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What builds the site, by the name under which it is imported.
BUILDERS = ("mkdocs", "material", "mkdocstrings", "mathjax", "nbconvert")


@pytest.fixture(scope="session")
def mkdocs() -> list[str]:
    """Command that builds a site. The test is skipped, with a warning, where the site cannot be built."""
    for package in BUILDERS:
        if importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed, so the site was NOT built and checked: pip install -e '.[docs]'"
            warnings.warn(reason, stacklevel=1)
            pytest.skip(reason)
    return [sys.executable, "-m", "mkdocs", "build", "--strict"]


@pytest.fixture(scope="session")
def site(mkdocs, tmp_path_factory) -> Path:
    """Folder of the built site, with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # an announcement of the theme's authors
    command = [*mkdocs, "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **quiet}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"WARNING|ERROR", done.stderr), done.stderr
    return folder
