"""The site is whole: it asks no other server, sets its formulas, shows the notebooks, and a browser finds no fault."""

import filecmp
import importlib.util
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

from scalabl_pyro import Prediction
from scalabl_pyro.cli.report import Report
from scalabl_pyro.cli.report_files import write_report

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
#: Attributes with which a tag makes the browser load a file, by tag. A plain link loads nothing.
LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "embed": "src", "object": "data"}
TERMS = """
Nat, Guide, Latent, ELBO, Gauge, k-hat, Epistemic uncertainty, Aleatoric uncertainty, Total uncertainty, Draw, NLL, ECE,
Brier score, AUROC, OOD, KL, Prior, Posterior, PSIS, LOO and elpd, Rank, Temperature, Risk and coverage
""".replace("\n", " ").split(",")


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loads(HTMLParser):
    """Collects what a page makes the browser load."""

    def __init__(self, html: str):
        super().__init__()
        self.urls: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        """Collect the address of a tag that loads a file."""
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.urls.append(given["href"])
        if url := given.get(LOADS.get(tag, "")):
            self.urls.append(url)
        self.urls += re.findall(r"url\(['\"]?([^)'\"]+)", given.get("style") or "")


def test_what_counts_as_loaded():
    html = '<a href="https://a.org"></a><script src="https://b.org"></script><link rel="stylesheet" href="c.css">'
    assert Loads(html + "<p style=\"background: url('d.png')\"><img src=e.png>").urls == [
        "https://b.org",
        "c.css",
        "d.png",
        "e.png",
    ]


def test_a_page_loads_only_files_of_the_site(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for url in Loads(page.read_text("utf-8")).urls:
            assert not re.match(r"(https?:)?//", url), f"{page.name} asks another server for {url}"
            if not url.startswith("data:") and page.name != "404.html":
                assert (page.parent / url.split("?")[0].split("#")[0]).exists(), f"{page.name} lacks {url}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text("utf-8")), sheet.name


def test_mathjax_is_served_and_used(site):
    mathjax = script("site_mathjax")
    assert filecmp.cmp(site / mathjax.URI, mathjax.script_of_the_package(), shallow=False)
    page = (site / "concepts.html").read_text("utf-8")
    assert page.count('class="arithmatex"') > 50
    scripts = Loads(page).urls
    assert scripts.index("assets/mathjax.js") < scripts.index(mathjax.URI), "the settings must come first"
    assert "http" not in (DOCS / "assets" / "mathjax.js").read_text("utf-8")


def test_a_package_without_mathjax_is_named(monkeypatch, tmp_path):
    mathjax = script("site_mathjax")
    monkeypatch.setattr(mathjax, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"django-static-mathjax 3\S* has no .*tex-svg\.js: pip install"):
        mathjax.script_of_the_package()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_is_there_and_at_most_80_wide(page):
    for language, code in re.findall(r"^[ \t]*```(\w*)\n(.*?)^[ \t]*```", page.read_text("utf-8"), re.M | re.S):
        wide = [line for line in code.splitlines() if len(line) > 80]
        assert not wide, f"a block of {language or 'text'}: {wide}"
        assert code.strip(), "a block is empty: its output is missing"


def test_signatures_wrap_at_80(site):
    lines = []
    for page in (site / "reference").glob("*.html"):
        for code in re.findall(r'doc-signature highlight"><pre>(.*?)</pre>', page.read_text("utf-8"), re.S):
            lines += re.sub(r"<[^>]+>|&[lg]t;", "", code).splitlines()
    assert len(lines) > 500
    # A line with one parameter cannot be broken: a long default, or a long annotation.
    assert not [line for line in lines if len(line) > 80 and line.count(":") > 1]


def navigation(entries) -> set[str]:
    """Pages of the navigation, at any depth."""
    if isinstance(entries, str):
        return {entries}
    children = entries.values() if isinstance(entries, dict) else entries
    return set().union(*map(navigation, children))


def test_every_page_and_notebook_is_in_the_navigation():
    listed = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    written = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    shown = {f"{script('site_notebooks').FOLDER}/{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb")}
    assert listed == written | shown


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path):
    notebooks, v4 = script("site_notebooks"), nbformat.v4
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    frame = '<div>\n<style scoped>\n  .dataframe { color: red }\n</style>\n<table border="1" class="dataframe">'
    outputs = [
        v4.new_output("stream", text="printed\n"),
        v4.new_output("display_data", {"image/png": dot}),
        v4.new_output("display_data", {"text/html": f"{frame}<tr><td>7</td></tr></table></div>"}),
    ]
    cells = [
        v4.new_markdown_cell("# Title\n\n[Quality](../docs/quality.md)"),
        v4.new_code_cell("raise SystemExit", outputs=outputs),
    ]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "toy.ipynb")
    text, pictures = notebooks.as_page(tmp_path / "toy.ipynb")
    (name,) = pictures
    assert pictures[name].startswith(b"\x89PNG") and f"]({name})" in text
    assert text.startswith("# Title\n\n[Quality](../quality.md)")
    assert "raise SystemExit" in text and "    printed\n" in text
    assert "<table><tr><td>7" in text and "scoped" not in text


def test_the_site_shows_every_notebook(site):
    notebooks = list((ROOT / "examples").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        page = (site / "tutorials" / f"{path.stem}.html").read_text("utf-8")
        outputs = [out for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
        drawn = [out for out in outputs if "image/png" in out.get("data", {}) and "text/html" not in out["data"]]
        assert page.count("<img ") >= len(drawn) > 0
        assert "dataframe" not in page


def test_readme_and_start_page_show_the_same_demo():
    between = re.compile(r"<!-- demo table -->\n(.*?)<!-- end -->\n", re.S)
    (readme,) = between.findall((ROOT / "README.md").read_text("utf-8"))
    (start,) = between.findall((DOCS / "index.md").read_text("utf-8"))
    assert "![" in start and "|---|" in start
    assert readme.replace("](docs/", "](") == start


def test_the_start_page_shows_the_output_of_its_code():
    shown = re.findall(r"```\n\n```text\n(.*?)```", (DOCS / "index.md").read_text("utf-8"), re.S)
    assert len(shown) == 2
    assert all(name in shown[0] for name in ("accuracy", "nll", "ece", "brier", "aurc"))
    assert all(name in shown[1] for name in ("prediction", "total", "epistemic"))


def test_figures_of_tuning_are_those_of_quality():
    quality = (DOCS / "quality.md").read_text("utf-8")
    figures = re.findall(r"[+-]\d\.\d+ ± \d\.\d+", (DOCS / "reference" / "tuning.md").read_text("utf-8"))
    assert len(figures) > 15
    missing = [figure for figure in figures if figure not in quality]
    assert not missing, f"docs/quality.md does not show {missing}"


def test_the_glossary_has_each_term_in_order():
    headings = re.findall(r"^## (.*)$", (DOCS / "glossary.md").read_text("utf-8"), re.M)
    assert {term.strip() for term in TERMS} <= set(headings)
    assert headings == sorted(headings, key=str.lower)


@pytest.fixture(scope="module")
def in_browser():
    """The script that checks pages in a browser, or a skip that says what was not checked."""
    missing = None if importlib.util.find_spec("websocket") else "the package websocket-client"
    checker = None if missing else script("check_in_browser")
    if checker is not None and checker.chromium() is None:
        missing = "Chromium"
    if missing:
        reason = f"{missing} is not installed, so NO page was opened in a browser: apt-get install chromium"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    return checker


FAULTS = {
    "the page scrolls sideways": '<div style="width: 3000px">wide</div>',
    "cut at the edge": f'<pre style="overflow: hidden; width: 200px"><code>{"x" * 200}</code></pre>',
    "picture not loaded": '<img src="missing.png" alt="a picture">',
    "formula not set": r'<span class="arithmatex">\(x\)</span>',
    "formula with an error": "<mjx-container><mjx-merror>bad</mjx-merror></mjx-container>",
    "formula at 1.0 of": '<mjx-container><svg width="9" height="9" viewBox="0 0 9000 9000"></svg></mjx-container>',
    "formula leaves its cell": (
        '<table style="width: 50px; table-layout: fixed"><td><mjx-container style="display: inline-block; width: 90px">'
        "</mjx-container></td></table>"
    ),
    "formula not marked": "<p>The sum $a + b$ of two.</p>",
    "error in a script": "<script>throw new Error('broken')</script>",
    "error in the console": "<script>console.error('broken')</script>",
    "request to another server": '<script src="http://127.0.0.1:9/x.js"></script>',
    "hard to read": '<p style="color: #bbb; background: white">pale</p>',
}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "html"), FAULTS.items(), ids=list(FAULTS))
def test_the_browser_check_finds(in_browser, tmp_path, fault, html):
    (tmp_path / "index.html").write_text(f"<html><link rel=icon href='data:,'><body>{html}</body></html>", "utf-8")
    found = in_browser.check(tmp_path, search=False)
    assert any(fault in line for line in found), found


@pytest.mark.slow
def test_the_browser_check_passes_a_good_page_and_takes_pictures(in_browser, tmp_path):
    (tmp_path / "index.html").write_text("<html><link rel=icon href='data:,'><body><p>good</p></body></html>", "utf-8")
    assert in_browser.check(tmp_path, tmp_path / "pictures", search=False) == []
    assert len(list((tmp_path / "pictures").glob("index-*.png"))) == 4
    with pytest.raises(FileNotFoundError, match="mkdocs build"):
        in_browser.check(tmp_path / "pictures")


@pytest.mark.slow
def test_no_page_has_a_fault_in_the_browser(in_browser, site):
    assert in_browser.check(site) == []


@pytest.mark.slow
def test_a_report_of_the_command_line_has_no_fault_in_the_browser(in_browser, tmp_path):
    """Also for a reader who prefers dark: each text has a color and a background of its own."""
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    found = Prediction(np.log([probs, probs]), np.array([0, 0, 1]), ("complaint", "praise"))
    rows = [{"review": "a review of some length , with <b> and & " * (i + 1)} for i in range(3)]
    report = Report.of(found, rows, source="test.csv", posterior="post", bootstrap=20)
    write_report(report, tmp_path / "report.html")
    page = tmp_path / "report.html"
    icon = "<link rel=icon href='data:,'><title>"  # else the browser asks for one
    page.write_text(page.read_text("utf-8").replace("<title>", icon), "utf-8")
    assert in_browser.check(tmp_path, search=False) == []


@pytest.mark.slow
def test_a_search_without_result_is_a_fault(in_browser, site, tmp_path, monkeypatch):
    shutil.copytree(site, tmp_path / "site")
    for page in (tmp_path / "site").rglob("*.html"):
        if page.name != "index.html" or page.parent.name != "site":
            page.unlink()
    monkeypatch.setattr(in_browser, "QUERIES", ("epistemic", "qqqxzz"))
    monkeypatch.setattr(in_browser, "PATIENCE", 5.0)
    monkeypatch.setattr(in_browser, "WIDTHS", (1400,))
    faults = in_browser.check(tmp_path / "site")
    assert "the search for 'qqqxzz' gives nothing" in faults[-1]
    assert not [fault for fault in faults if "epistemic" in fault]
