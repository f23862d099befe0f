"""Hook of mkdocs: the site serves its own MathJax, from an installed package, so a page asks no other server."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

#: One file holds the TeX reader, the SVG writer and the shapes of all glyphs.
SCRIPT = "tex-svg.js"
#: Where mkdocs.yml expects it.
URI = f"assets/mathjax/{SCRIPT}"


def script_of_the_package() -> Path:
    """Path of MathJax in the package ``django-static-mathjax``, which needs no Django."""
    path = Path(str(files("mathjax"))) / "static" / "mathjax" / "es5" / SCRIPT
    if not path.is_file():
        found = version("django-static-mathjax")
        raise FileNotFoundError(
            f"django-static-mathjax {found} has no {path}: pip install -c constraints.txt '.[docs]'"
        )
    return path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add MathJax to the files of the site."""
    files.append(File.generated(config, URI, abs_src_path=str(script_of_the_package())))
    return files
