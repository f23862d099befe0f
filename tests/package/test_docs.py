"""The documentation is true: its code runs, it names everything public, and it builds without a warning."""

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest
import tiny
import torch
import toy_scores
import toy_tables
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import scalabl_pyro as sp

ROOT = Path(__file__).resolve().parents[2]
#: A block is left out when `<!-- no-run -->` stands on the line before it.
BLOCK = re.compile(
    r"(?P<no_run><!-- no-run.*?-->\n+)?^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<shown>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
STEPS = 3


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line above, code) of each block of a page that runs."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [(text.count("\n", 0, m.start("code")), m["code"]) for m in found if not m["no_run"]]


#: Packages of extras that the code of a page needs.
NEEDS = {"scikit-learn.md": "sklearn"}
#: Its commands and its code need each other, so tests/package/test_tutorials.py runs them together.
WITH_COMMANDS = "from-csv-to-decision.md"
EVERYTHING = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in EVERYTHING if page.name != WITH_COMMANDS and blocks(page)]


@pytest.fixture
def toy_hub(monkeypatch, tmp_path):
    """Names of the hub give tiny models and rows, training is a few steps long, files go into a folder of their own."""
    monkeypatch.chdir(tmp_path)
    read_tokenizer = AutoTokenizer.from_pretrained

    def load_tokenizer(name, **options):
        if Path(name).exists():
            return read_tokenizer(name, **options)
        own = tiny.tokenizer()
        own.eos_token = "night"  # completions end with it
        return own

    def load_classifier(name, num_labels=2, **options):
        return tiny.classifier(num_labels=num_labels)

    def load_causal_lm(name, dtype=torch.float32, **options):
        return tiny.causal_lm(dtype=dtype)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_tokenizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_causal_lm)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load_classifier)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: tiny.question_rows(16))
    trainer = sys.modules["scalabl_pyro.training.loop"].Trainer
    run = trainer.run
    monkeypatch.setattr(trainer, "run", lambda self, steps: run(self, steps[:STEPS]))
    mcmc, few = sp.mcmc, {"num_samples": 4, "warmup_steps": 4, "max_tree_depth": 2, "progress": False}
    monkeypatch.setattr(sp, "mcmc", lambda *args, **options: mcmc(*args, **{**options, **few}))
    tune = sp.tune
    monkeypatch.setattr(sp, "tune", lambda *args, **options: tune(*args, **{**options, "eval_every": 1}))
    for name, seed in {"train": 0, "test": 1}.items():
        lines = [json.dumps(row) + "\n" for row in tiny.question_rows(16, seed=seed)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    toy_tables.write(tmp_path)
    matplotlib.use("Agg")
    yield
    plt.close("all")


def toy_names() -> dict[str, object]:
    """What a page may speak of without having made it."""
    llm, tokenizer = tiny.causal_lm(), tiny.tokenizer()
    blora, task = sp.bayesian_lora(llm), sp.MultipleChoice(tokenizer)
    train_data, test_data = tiny.question_rows(16), tiny.question_rows(8, seed=1)
    result = sp.fit(blora, task, train_data, num_steps=STEPS, lr=1e-2, progress=False)
    return {
        "__name__": "page",
        "scalabl_pyro": sp,
        "llm": llm,
        "tokenizer": tokenizer,
        "blora": blora,
        "task": task,
        "train_data": train_data,
        "test_data": test_data,
        "result": result,
        "posterior": result.posterior,
        "history": result.history,
        "prediction": result.posterior.predict(test_data, num_draws=4),
        "lora": result.posterior.predict(test_data, num_draws=0),  # the prediction of another method
        "scored": toy_scores.scored([["The", " sky", " is", " blue", "."]]),
        "outside": result.posterior.predict(tiny.question_rows(8, seed=2), num_draws=4),
    }


def test_the_output_that_the_guide_shows_is_real():
    """The blocks with output in the guide stand alone, so that they print the same with any model."""
    shown = [
        found
        for page in sorted((ROOT / "docs" / "guide").rglob("*.md"))
        for found in BLOCK.finditer(page.read_text("utf-8"))
    ]
    shown = [found for found in shown if found["shown"] is not None]
    assert len(shown) >= 2
    for found in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(found["code"], {"np": np, "metrics": sp.metrics})
        assert printed.getvalue() == found["shown"], found["code"]


@pytest.mark.filterwarnings("ignore")  # of ArviZ about itself and about few draws
@pytest.mark.usefixtures("toy_hub", "stock_pyro")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    names = toy_names()
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # errors show page and line


def test_a_task_of_the_how_to_takes_at_most_15_lines():
    page = ROOT / "docs" / "extend" / "own-task.md"
    classes = [part for _, code in blocks(page) for part in re.findall(r"^class .*?(?=^\S|\Z)", code, re.M | re.S)]
    assert classes
    for source in classes:
        assert len([line for line in source.splitlines() if line.strip()]) <= 15, source


@pytest.mark.parametrize(
    ("link", "passes"),
    [("other.md#there", True), ("missing.md", False), ("other.md#missing", False), ("#missing", False)],
)
def test_dead_links_and_anchors_fail_the_build(mkdocs, tmp_path, link, passes):
    """A site of two pages under the options of mkdocs.yml, without its plugins and hooks, which no link needs."""
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text(f"# Start\n\n[link]({link})\n", "utf-8")
    (pages / "other.md").write_text("# Other\n\n## There\n", "utf-8")
    config = {"INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(pages), "nav": ["index.md", "other.md"]}
    config |= {"plugins": [], "hooks": [], "site_dir": str(tmp_path / "site"), "theme": {"name": "mkdocs"}}
    (tmp_path / "mkdocs.yml").write_text(json.dumps(config), "utf-8")
    command = [*mkdocs, "--config-file", str(tmp_path / "mkdocs.yml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == passes, done.stderr


def test_make_docs_counts_warnings():
    """With ``--quiet`` mkdocs does not count warnings, so ``--strict`` would let them pass."""
    (command,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text("utf-8"))
    assert "--strict" in command
    assert "--quiet" not in command


def public_names() -> set[str]:
    """What ``import scalabl_pyro`` offers; of its namespaces, each of their names."""
    names = set()
    for name in sp.__all__:
        value = getattr(sp, name)
        if inspect.ismodule(value):
            own = {n for n, v in vars(value).items() if getattr(v, "__module__", None) == value.__name__}
            inside = getattr(value, "__all__", {n for n in own if not n.startswith("_")})
            names |= {f"scalabl_pyro.{name}.{n}" for n in inside}
        else:
            names.add(f"scalabl_pyro.{name}")
    return names


def home(path: str) -> str:
    """Where an object is defined, as the inventory may have that name only."""
    value = sp
    for part in path.split(".")[1:]:
        value = getattr(value, part)
    return f"{getattr(value, '__module__', '')}.{path.rsplit('.', 1)[-1]}"


def test_every_public_name_is_documented(site):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.split()[0] for line in inventory.splitlines()}
    missing = sorted(name for name in public_names() if not {name, home(name)} & shown)
    assert not missing, f"docs/reference/ does not show {missing}"


def test_no_sphinx_role_is_left_in_the_site(site):
    for page in (site / "reference").glob("*.html"):
        assert not re.search(r":(?:attr|class|func|meth|mod):", page.read_text("utf-8")), page.name


def script(name: str):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_public_names_show_the_code():
    public_api = script("public_api")
    page = public_api.PAGE.read_text("utf-8")
    missing = sorted(name for name in public_api.public_names() if f"| `{name}` |" not in page)
    assert not missing, f"docs/reference/index.md lacks {missing}: run python docs/public_api.py"
    assert public_api.updated(page) == page, "docs/reference/index.md is old: run python docs/public_api.py"
    assert {f"scalabl_pyro.{name}" for name in public_api.public_names()} >= public_names()


def test_every_public_name_has_an_example_that_runs():
    public_api = script("public_api")
    code = "\n".join(code for _, code in blocks(public_api.PAGE))
    missing = [name for name in public_api.public_names() if not re.search(rf"\b{name.rpartition('.')[2]}\b", code)]
    assert not missing, f"no example on docs/reference/index.md uses {missing}"


def test_the_picture_of_the_packages_shows_the_code():
    draw_packages = script("draw_packages")
    assert draw_packages.read_picture() == draw_packages.read_code(), "run python docs/draw_packages.py"
    line = (ROOT / "tests" / "package" / "test_structure.py").read_text("utf-8").split('LINE = """')[1].split('"""')[0]
    order = [name for name in line.replace("|", " ").split() if name in draw_packages.LINE]
    assert order == draw_packages.LINE


def test_functions_named_on_a_page_exist():
    page = (ROOT / "docs" / "internals.md").read_text("utf-8")
    named = re.findall(r"([\w/]+\.py):([\w.]+)", page)
    assert len(named) > 20
    for file, name in named:
        if file == "file.py":  # how names are written
            continue
        body = ast.parse((ROOT / "scalabl_pyro" / file).read_text("utf-8")).body
        for part in name.split("."):
            found = [n for n in body if getattr(n, "name", None) == part]
            assert found, f"{file} has no {name}"
            body = found[-1].body


def test_a_word_travels_in_at_most_six_hops():
    page = (ROOT / "docs" / "internals.md").read_text("utf-8")
    sections = re.split(r"^##+ ", page.split("## How a row becomes")[1], flags=re.M)
    hops = {section.splitlines()[0]: re.findall(r"^(\d+)\. ", section, flags=re.M) for section in sections}
    assert {"`prior`", "`guide`", "`seed`", "`num_draws`", "`kl_weight`"} < set(hops)
    assert all(int(number) <= 6 for numbers in hops.values() for number in numbers)
