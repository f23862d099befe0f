"""The package keeps its shape: data flows one way, files stay small, nothing prints or pickles."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import scalabl_pyro

PACKAGE = Path(scalabl_pyro.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


#: A package imports only what stands left of it.
LINE = """
_version _deprecated _values _probabilities _errors _arguments _display | _process | storage | lora | priors | data
| tasks | model | guides | distributed | metrics | prediction | analysis | posterior | conformal | plots | training
| inference | infer | baselines | integrations | cli | __main__
""".replace("|", " ").split()


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path) for path in FILES}


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, wherever in the file the import stands."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split(".")) * bool(node.module)
            found |= {name if (name := (*base, alias.name)) in MODULES else base for alias in node.names}
    return found - {module_of(path)}


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p)], ids=str)
def test_imports_point_left(path):
    own = module_of(path)[0]
    assert own in LINE, f"{own} has no place in the line of packages"
    for name in {module[0] for module in imports_of(path) if module} - {own}:
        assert LINE.index(name) < LINE.index(own), f"{own} imports {name}, which stands right of it"


def test_no_circle_of_files():
    left = {module_of(path): imports_of(path) for path in FILES if module_of(path)}
    # A package whose __init__ collects its own files is what they make, not something that they need.
    left = {m: {n for n in names if n} for m, names in left.items()}
    while left:
        free = {module for module, names in left.items() if not names & set(left)}
        assert free, f"these files import each other: {sorted('.'.join(m) for m in left)}"
        left = {module: names for module, names in left.items() if module not in free}


#: Families of posteriors. Other packages ask what a guide says of itself, and a guide of a user can say the same.
FAMILIES = {name for name in dir(scalabl_pyro.guides) if name.endswith("Guide") and name != "Guide"}


def test_no_package_but_guides_asks_which_family_a_guide_is():
    for path in (p for p in FILES if module_of(p)[:1] != ("guides",)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & FAMILIES, f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


def test_names_of_saved_tensors_are_taken_apart_in_one_place():
    """``storage.tensor_files.below`` gives the entries under a prefix; no file selects them by hand."""
    for path in (p for p in FILES if module_of(p) != ("storage", "tensor_files")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.DictComp):
                tests = [t for g in node.generators for t in g.ifs if isinstance(t, ast.Call)]
                by_hand = [t for t in tests if ast.unparse(t.func).endswith(".startswith")]
                assert not [t for t in by_hand if isinstance(t.args[0], ast.Constant)], f"{path.name}, {node.lineno}"


#: Objects of this package whose attributes nobody sets from outside: what they need goes into their constructors.
CLOSED = re.compile(r"(passes|blora|adapter|trainer|step|checkpoints|objective|posterior|program)\.\w+")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_objects_set_their_own_attributes(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            assert not CLOSED.fullmatch(ast.unparse(node)), (
                f"line {node.lineno}: {ast.unparse(node)} is set from outside"
            )


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_explains_itself_and_stays_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 300


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its name to its end, without its docstring."""
    first = node.body[0]
    skipped = set()
    if ast.get_docstring(node) is not None:
        skipped = set(range(first.lineno, first.end_lineno + 1))
    return len(set(range(node.lineno, node.end_lineno + 1)) - skipped)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_stay_short(path):
    """A function has at most 60 lines, or the line above it says ``# long because ...``."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > 60:
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            reason = start > 1 and lines[start - 2].strip().startswith("# long because ")
            assert reason, f"{node.name} has {code_lines(node)} lines"


#: Phrases that a reader must decode: a dropped noun ("of the first layer" for a device), "is no" for "is not a".
DECODE = re.compile(r"^Of |: of |(?<![Tt]here) is no ")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_docstrings_are_plain_english(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for line in (ast.get_docstring(node) or "").splitlines():
                assert not DECODE.search(line.strip()), f"{path.name}: {line.strip()!r}: say what it is, with its noun"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_print_no_pickle(path):
    text = path.read_text(encoding="utf-8")
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
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
    assert len(names) <= 30
    for name in scalabl_pyro.__all__:
        assert hasattr(scalabl_pyro, name)
