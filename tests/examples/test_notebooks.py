"""The committed notebooks: built from their sources as they are now, executed at full size, and without noise."""

import copy
import re
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: Source and notebook.
NOTEBOOKS = {
    "posterior_analysis.py": "posterior_analysis.ipynb",
    "ablation_notebook.py": "ablation.ipynb",
    "review_table.py": "review_table.ipynb",
    "written_text.py": "written_text.ipynb",
}
PAIRS = pytest.mark.parametrize(("source", "notebook"), NOTEBOOKS.items())


def faults(source, notebook):
    """What is wrong with an executed notebook, one text per fault."""
    cells = [[(cell.cell_type, cell.source.strip()) for cell in book.cells] for book in (source, notebook)]
    found = [] if cells[0] == cells[1] else ["its cells are not those of its source"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("it was not executed once, from its first cell to its last one")
    for i, cell in enumerate(code, start=1):
        kinds = [output.output_type for output in cell.outputs]
        images = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        if re.search(r"^\s*(display|print)\(", cell.source, re.MULTILINE) and not kinds:
            found.append(f"code cell {i} has no output")
        if len(images) < len(re.findall(r"^\s*plt\.show\(\)", cell.source, re.MULTILINE)):
            found.append(f"code cell {i} lacks a picture")
        if "error" in kinds:
            found.append(f"code cell {i} ended in an error")
        for output in cell.outputs:
            text = "".join(output.get("text", "")) if output.output_type == "stream" else ""
            if output.output_type == "stream" and (output.name == "stderr" or "Warning" in text):
                found.append(f"code cell {i} printed noise: {text[:80]}")
    if not any("Full size. Python" in "".join(o.get("text", "")) for cell in code for o in cell.outputs):
        found.append("it was not executed at full size")
    return found


def read(name):
    assert (EXAMPLES / name).exists(), f"examples/{name} is not built: make notebook"
    return jupytext.read(EXAMPLES / name)


@PAIRS
def test_a_notebook_is_executed_without_noise_and_not_stale(source, notebook):
    assert not (found := faults(read(source), read(notebook))), f"{notebook}: {found}. Build it: make notebook"


def break_source(book):
    next(cell for cell in book.cells if cell.cell_type == "code").source += "\n1 + 1"


def break_text(book):
    book.cells[0].source += " More."


def break_order(book):
    next(cell for cell in book.cells if cell.cell_type == "code").execution_count = 7


def break_outputs(book):
    for cell in book.cells:
        if "plt.show()" in cell.source:
            cell.outputs = []


def add_output(book, output):
    next(cell for cell in book.cells if cell.cell_type == "code").outputs.append(output)


def break_with_stderr(book):
    add_output(book, stream("stderr", "bitsandbytes: no kernel"))


def break_with_warning(book):
    add_output(book, stream("stdout", "x.py:1: FutureWarning: old"))


def break_with_error(book):
    add_output(book, node({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}))


def break_size(book):
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = output.text.replace("Full size", "Toy size")


def node(fields):
    return pytest.importorskip("nbformat").from_dict(fields)


def stream(name, text):
    return node({"output_type": "stream", "name": name, "text": text})


def sound_book():
    """A small notebook without faults."""
    code = [("print(machine())", [stream("stdout", "Full size. Python 3.12.\n")]), ("plot()\nplt.show()", [])]
    code[1][1].append(node({"output_type": "display_data", "data": {"image/png": "x"}, "metadata": {}}))
    cells = [{"cell_type": "markdown", "source": "# Title", "metadata": {}}]
    for i, (source, outputs) in enumerate(code, start=1):
        cells.append({"cell_type": "code", "source": source, "outputs": outputs, "execution_count": i, "metadata": {}})
    return node({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (break_source, "not those of its source"),
        (break_text, "not those of its source"),
        (break_order, "not executed once"),
        (break_outputs, "lacks a picture"),
        (break_with_stderr, "printed noise"),
        (break_with_warning, "printed noise"),
        (break_with_error, "ended in an error"),
        (break_size, "not executed at full size"),
    ],
)
def test_each_fault_of_a_notebook_is_found(harm, fault):
    book = sound_book()
    assert faults(book, copy.deepcopy(book)) == []
    broken = copy.deepcopy(book)
    harm(broken)
    assert any(fault in text for text in faults(book, broken))


@PAIRS
def test_a_notebook_begins_with_what_one_will_know_and_ends_with_where_to_go(source, notebook):
    texts = [cell.source for cell in read(source).cells if cell.cell_type == "markdown"]
    title, _, rest = texts[0].partition("\n")
    goals = rest.partition("**What you will know at the end**")[2].partition("\n\nThe notebook")[0]
    goals = goals.partition("\n\nRun")[0]
    assert title.startswith("# ") and 3 <= len(re.findall(r"^- ", goals, re.MULTILINE)) <= 5
    assert re.search(r"takes (about )?\d+ (to \d+ )?minutes", texts[0].replace("\n", " ")), "say how long it takes"
    assert read(source).cells[-1].source == "print(notebooks.duration())"
    assert "## Where to go next" in texts[-1]


@PAIRS
def test_files_that_a_notebook_names_exist(source, notebook):
    texts = "\n".join(cell.source for cell in read(source).cells if cell.cell_type == "markdown")
    named = set(re.findall(r"`((?:docs|examples)/[\w/.-]+)`", texts))
    assert named and all((EXAMPLES.parent / name).exists() for name in named), named
    books = set(re.findall(r"`(\w+\.(?:ipynb|py))`", texts)) - {"articles.csv"}
    assert books and all((EXAMPLES / name).exists() for name in books), books


def test_make_builds_every_notebook():
    makefile = (EXAMPLES.parent / "Makefile").read_text(encoding="utf-8")
    for source, notebook in NOTEBOOKS.items():
        assert f"{source}:{notebook}" in makefile
