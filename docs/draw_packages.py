"""Draws ``images/packages.svg``: the packages in the order of data flow, and who imports whom, read from the code.

Run ``python docs/draw_packages.py`` after a package was added, or imports another one than before. The picture carries
the data that it was drawn from, so a test can tell whether it still shows the code.
"""

import ast
import json
import re
import textwrap
from html import unescape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scalabl_pyro"
PICTURE = ROOT / "docs" / "images" / "packages.svg"

#: Each package imports only packages that stand before it.
LINE = (
    "_process storage lora priors data tasks model guides distributed metrics prediction analysis posterior conformal "
    "plots training inference infer baselines integrations cli"
).split()


def files_of(package: str) -> list[Path]:
    """Python files of a package, or the one file of a module."""
    folder = PACKAGE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{package}.py"]


def imports_of(path: Path) -> set[str]:
    """Packages of the library that a file imports, wherever in the file the import stands."""
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found & set(LINE)


def sentence_of(package: str) -> str:
    """First line of a package's docstring."""
    folder = PACKAGE / package
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = re.sub(r":\w+:`~?(?:scalabl_pyro\.)?([^`]+)`", r"\1", docstring.splitlines()[0])
    return first.replace("``", "")


def read_code() -> dict[str, dict[str, str | list[str]]]:
    """What the picture shows: package -> its sentence and the packages that it imports, in the order of the line."""
    packages: dict[str, dict[str, str | list[str]]] = {}
    for package in LINE:
        imported = set().union(*map(imports_of, files_of(package))) - {package}
        packages[package] = {"sentence": sentence_of(package), "imports": sorted(imported, key=LINE.index)}
    return packages


def read_picture() -> dict[str, dict[str, str | list[str]]]:
    """The data that the picture was drawn from."""
    found = re.search(r"<dc:description>(.*?)</dc:description>", PICTURE.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"{PICTURE} carries no data: draw it with docs/draw_packages.py.")
    data: dict[str, dict[str, str | list[str]]] = json.loads(unescape(found[1]))
    return data


def draw(packages: dict[str, dict[str, str | list[str]]], path: Path) -> None:
    """Draw a row for each package: its name, its imports as dots below the diagonal, its sentence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"svg.fonttype": "path", "svg.hashsalt": "packages", "font.size": 10, "font.family": "DejaVu Sans"}
    names, blue, gray = list(packages), "#1f5fa8", "#d8dde3"
    with plt.rc_context(style):
        figure, ax = plt.subplots(figsize=(13, 0.36 * len(names) + 1.4), facecolor="white")
        for y, (name, package) in enumerate(packages.items()):
            ax.plot([-0.5, y + 0.4], [y, y], color=gray, linewidth=0.8, zorder=0)
            ax.plot([y, y], [y, len(names) - 0.5], color=gray, linewidth=0.8, zorder=0)
            ax.text(-0.8, y, name, ha="right", va="center", weight="bold")
            ax.text(y, -0.7, name, ha="left", va="bottom", rotation=55, color="#444444", fontsize=9)
            ax.text(len(names) + 0.2, y, textwrap.fill(str(package["sentence"]), 80), ha="left", va="center")
            ax.plot(y, y, marker="s", markersize=8, color="#222222")
            columns = [names.index(imported) for imported in package["imports"]]
            ax.plot(columns, [y] * len(columns), linestyle="", marker="o", markersize=8, color=blue)
        ax.set_xlim(-4.2, len(names) + 24)
        ax.set_ylim(len(names) - 0.3, -4.0)
        ax.axis("off")
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
        metadata = {"Date": None, "Description": json.dumps(packages)} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    draw(read_code(), PICTURE)
