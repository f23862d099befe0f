"""Run the code of tutorials and start page on SmolLM2-135M, and write its real output and pictures into the pages.

    python docs/run_tutorials.py table-to-review-list index    # names of pages; default: all pages with output

A ``text`` or ``json`` block that follows a ``python`` block holds what that block prints; the same holds for a ``bash``
block whose commands are ``scalabl-pyro`` or ``curl``, see docs/page_commands.py. A picture that follows a ``python``
block is the last figure that the block draws. Names of the hub give SmolLM2 from its Python package. The tables come
from docs/tutorial_data.py. Blocks below the last output or picture of a page are not run.
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
import page_commands
import tutorial_data
from _support.models import smollm2
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGES = Path(__file__).resolve().parent / "tutorials"
START = PAGES.with_name("index.md")
#: Model that commands load. A folder of this name stands where they run.
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```\n"
    r"(?P<text>\n```(?P<kind>text|json)\n(?P<out>.*?)^```\n)?"
    r"(?P<picture>\n!\[[^\]]*\]\((?P<path>[^)]+)\)\n)?",
    re.MULTILINE | re.DOTALL,
)


def run(page: Path) -> None:
    """Run the blocks of a page in order, and write its new outputs and pictures as soon as they are there."""
    names: dict[str, object] = {"__name__": "page"}
    rest, done = page.read_text("utf-8"), ""
    with page_commands.Commands() as shell:
        while any(block["text"] or block["picture"] for block in BLOCK.finditer(rest)):
            found = BLOCK.search(rest)
            start = time.perf_counter()
            printed = _run_block(found, names, shell, page.name)
            seconds = time.perf_counter() - start
            sys.stdout.write(f"{seconds:6.0f} s  {found['code'].strip().splitlines()[-1]}\n{printed}\n")
            sys.stdout.flush()
            done += rest[: found.start()] + f"```{found['language']}\n{found['code']}```\n"
            if found["text"]:
                done += f"\n```{found['kind']}\n{printed.rstrip()}\n```\n"
            if found["picture"]:
                plt.gcf().savefig(page.parent / found["path"], dpi=100)
                plt.close("all")
                done += found["picture"]
            rest = rest[found.end() :]
            page.write_text(done + rest, "utf-8")


def _run_block(found: re.Match[str], names: dict[str, object], shell: page_commands.Commands, page: str) -> str:
    """Run one block, and return what it prints."""
    code = found["code"]
    if found["language"] == "bash":
        return shell.run(code, may_fail="error:" in (found["out"] or "")) if page_commands.is_run(code) else ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, page, "exec"), names)
    return printed.getvalue()


def use_smollm2() -> None:
    """Make ``from_pretrained`` return SmolLM2 and its tokenizer, from their package, unless it is given a folder."""
    llm, tokenizer = smollm2()
    read_llm, read_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def load_llm(name, **options):
        return read_llm(name, **options) if Path(name).is_dir() else llm

    def load_tokenizer(name, **options):
        return read_tokenizer(name, **options) if Path(name).is_dir() else tokenizer

    AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained = load_llm, load_tokenizer


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
            if "```bash\nscalabl-pyro" in page.read_text("utf-8"):
                tutorial_data.write_reviews(Path(folder))
                tutorial_data.write_model(Path(folder), HUB_NAME)
            os.chdir(folder)
            run(page)
            os.chdir(PAGES)


if __name__ == "__main__":
    main()
