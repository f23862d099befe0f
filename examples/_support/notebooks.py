"""What the notebooks share: the switch to toy size, output without noise, and pictures that can be printed.

Import it, and call :func:`set_up`, before everything else: a progress bar reads its switch when it is imported.
"""

import logging
import os
import platform
import time
import warnings
from pathlib import Path

#: Time at which the notebook began.
START = time.perf_counter()

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in the file
with warnings.catch_warnings(action="ignore"):  # ArviZ 0.x warns about ArviZ 1.x at its import.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # The first import collects fonts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns about kernels that some CPUs lack.
    import arviz
    import matplotlib.pyplot as plt
    import pandas as pd
    import torch
    import transformers
    from IPython import get_ipython

#: Whether a notebook runs on a random model and few rows, in seconds. Its numbers mean nothing then.
TOY = os.environ.get("SCALABL_TOY") == "1"

#: Folder of the results of all examples, at the top of the repository.
RUNS = Path(__file__).resolve().parents[2] / "runs"


def set_up() -> None:
    """Silence what is not a result, show wide tables, and draw pictures sharp enough for print."""
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)  # no warning about articles that are cut
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pd.options.display.max_columns, pd.options.display.max_colwidth = 20, 90
    plt.rcParams |= {"font.size": 10, "axes.titlesize": 11, "savefig.facecolor": "white"}
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")  # twice the resolution at the same size
    if TOY:
        torch.set_num_threads(1)


def machine() -> str:
    """Describe the size of the run, the versions behind its numbers, and the machine."""
    libraries = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, arviz))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{'Toy' if TOY else 'Full'} size. Python {platform.python_version()}, {libraries}, {device}."


def duration() -> str:
    """Say how long the notebook has taken so far."""
    return f"The notebook took {(time.perf_counter() - START) / 60:.1f} minutes."
