"""The gallery shows every plot: each block of code draws the picture below it."""

import importlib.util
import re
from pathlib import Path

import pytest
import tiny
import toy_scores
from matplotlib import pyplot as plt
from PIL import Image

import scalabl_pyro as sp
from scalabl_pyro import plots

DOCS = Path(__file__).resolve().parents[2] / "docs"
PICTURES = DOCS / "images" / "gallery"


@pytest.fixture
def draw_gallery():
    spec = importlib.util.spec_from_file_location("draw_gallery", DOCS / "draw_gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(draw_gallery):
    """(code, picture) of each block that has a picture."""
    page = draw_gallery.PAGE.read_text(encoding="utf-8")
    return [(m["code"], m["picture"]) for m in draw_gallery.BLOCK.finditer(page) if m["picture"]]


def test_every_plot_has_its_picture(draw_gallery):
    called = {name for code, _ in drawn(draw_gallery) for name in re.findall(r"\bplots\.(\w+)\(", code)}
    assert called == set(plots.__all__)


def test_every_picture_of_the_page_is_drawn_by_the_code_above_it(draw_gallery):
    page = draw_gallery.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert shown == [picture for _, picture in drawn(draw_gallery)]
    assert len(shown) == len(set(shown))
    assert sorted(DOCS / picture for picture in shown) == sorted(PICTURES.iterdir()), "run python docs/draw_gallery.py"


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.png")), ids=lambda path: path.name)
def test_a_picture_is_small_and_opaque(path):
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.width <= 1000
        assert min(picture.convert("RGBA").getchannel("A").getextrema()) == 255, "the page shows through"


def test_the_script_draws_every_picture(draw_gallery, monkeypatch, tmp_path):
    """The code of the page on a tiny model; the pictures go elsewhere."""
    blora, task = sp.bayesian_lora(tiny.causal_lm()), sp.MultipleChoice(tiny.tokenizer())
    rows = tiny.question_rows(16)
    result = sp.fit(blora, task, rows, num_steps=2, progress=False)
    found = {name: result.posterior.predict(rows, num_draws=2) for name in ("prediction", "outside", "lora")}
    found["scored"] = toy_scores.scored([["The", " sky", " is", " blue", "."] * 12])
    expected = [tmp_path / picture for _, picture in drawn(draw_gallery)]
    monkeypatch.setattr(draw_gallery, "DOCS", tmp_path)
    assert draw_gallery.draw({"result": result, "posterior": result.posterior, **found}) == expected
    assert all(path.stat().st_size > 5000 for path in expected)
    assert not plt.get_fignums()
