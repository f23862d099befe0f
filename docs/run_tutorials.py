"""Run the code of tutorials and start page on SmolLM2-135M, and write its real output and pictures into the pages.

    python docs/run_tutorials.py table-to-review-list index    # names of pages; default: all pages with output

A ``text`` block that follows a ``python`` block holds what that block prints. A picture that follows a ``python`` block
is the last figure that the block draws. Names of the hub give SmolLM2 from its Python package. The tables come from
docs/tutorial_data.py. Blocks below the last output or picture of a page are not run.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import tutorial_data
from _support.models import smollm2
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGES = Path(__file__).resolve().parent / "tutorials"
START = PAGES.with_name("index.md")
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?P<text>\n```text\n(?P<out>.*?)^```\n)?"
    r"(?P<picture>\n!\[[^\]]*\]\((?P<path>[^)]+)\)\n)?",
    re.MULTILINE | re.DOTALL,
)


def run(page: Path) -> None:
    """Run the blocks of a page in order, and write its new outputs and pictures as soon as they are there."""
    names: dict[str, object] = {"__name__": "page"}
    rest, done = page.read_text("utf-8"), ""
    while any(block["text"] or block["picture"] for block in BLOCK.finditer(rest)):
        found = BLOCK.search(rest)
        printed, start = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(printed):
            exec(compile(found["code"], page.name, "exec"), names)
        seconds = time.perf_counter() - start
        sys.stdout.write(f"{seconds:6.0f} s  {found['code'].strip().splitlines()[-1]}\n{printed.getvalue()}\n")
        sys.stdout.flush()
        done += rest[: found.start()] + f"```python\n{found['code']}```\n"
        if found["text"]:
            done += f"\n```text\n{printed.getvalue().rstrip()}\n```\n"
        if found["picture"]:
            plt.gcf().savefig(page.parent / found["path"], dpi=100)
            plt.close("all")
            done += found["picture"]
        rest = rest[found.end() :]
        page.write_text(done + rest, "utf-8")


def use_smollm2() -> None:
    """Make ``from_pretrained`` return SmolLM2 and its tokenizer, from their Python package."""
    llm, tokenizer = smollm2()
    AutoModelForCausalLM.from_pretrained = lambda name, **options: llm
    AutoTokenizer.from_pretrained = lambda name, **options: tokenizer


def main() -> None:
    """Run the pages that the command line names."""
    everything = [START, *(page for page in sorted(PAGES.glob("*.md")) if "```python" in page.read_text("utf-8"))]
    pages = [page for page in everything if page.stem in sys.argv[1:] or not sys.argv[1:]]
    warnings.filterwarnings("ignore")
    logging.getLogger("scalabl_pyro").setLevel(logging.ERROR)
    use_smollm2()
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            tutorial_data.write_notes(Path(folder))
            tutorial_data.write_readers(Path(folder))
            tutorial_data.write_questions(Path(folder))
            os.chdir(folder)
            run(page)
            os.chdir(PAGES)


if __name__ == "__main__":
    main()
