"""The package keeps its shape: data flows one way, files stay small, nothing prints or pickles."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import scalabl_pyro

PACKAGE = Path(scalabl_pyro.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: A file imports only what stands above it.
ORDER = """
_version _errors _lock _rng _pyro storage files strict_json tensor_files interrupts subspace targets prefix positions
recompute factors lora variant start activate attach adapted memory priors hub_rows rows data training_data control
distributed likelihoods model task_model sharding guides draws quasi elbo objective stein optimiser state faults scope
step training causal_masks graphs metrics prediction predictive logdensity linearised arviz_io psis diagnostics
fingerprint saved_config restore checkpoint serialization arviz_groups posterior comparison laplace mcmc same_run resume
result fit refit ensemble plots baselines doctor cli __main__
""".split()


def module_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs (not for type checking)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", None) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            depth = len(path.relative_to(PACKAGE).parts) - node.level
            if depth == 0:
                names |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py" or p.parent != PACKAGE], ids=str)
def test_imports_point_upwards(path):
    own = module_name(path)
    assert own in ORDER, f"{own} has no place in the order"
    for name in runtime_imports(path) - {own}:
        assert ORDER.index(name) < ORDER.index(own), f"{own} imports {name}, which stands below it"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_explains_itself_and_stays_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 340


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_print_no_pickle(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])print\(", text)
    assert not re.search(r"\bpickle\.|torch\.load\(|clear_param_store|trust_remote_code=True", text)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_transformers_reads_is_read_without_its_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and re.match(r"Auto\w+\.from_pretrained$", ast.unparse(node.func)):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("trust_remote_code") == "False", ast.unparse(node)


def test_examples_and_pages_trust_no_remote_code():
    root = PACKAGE.parent
    for path in [root / "README.md", *(root / "examples").rglob("*.*"), *(root / "docs").rglob("*.md")]:
        if path.suffix in (".py", ".md", ".ipynb"):
            assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path


def test_all_names_exist_and_are_few():
    names = [n for n in scalabl_pyro.__all__ if not inspect.ismodule(getattr(scalabl_pyro, n))]
    assert len(names) <= 22
    for name in scalabl_pyro.__all__:
        assert hasattr(scalabl_pyro, name)
