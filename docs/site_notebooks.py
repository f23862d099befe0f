"""Hook of mkdocs: each executed notebook of examples/ becomes a page of the site, with the outputs that it holds."""

import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples"
#: Folder of the pages, beside the tutorials.
FOLDER = "tutorials"


def as_page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by file name. Nothing is executed."""
    cells = nbformat.read(notebook, as_version=4)
    text, resources = MarkdownExporter().from_notebook_node(cells, {"unique_key": notebook.stem})
    text = re.sub(r"\s*<style scoped>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<table border="1" class="dataframe">', "<table>", text)  # the theme styles tables without a class
    text = text.replace("](../docs/", "](../")  # from examples/ as from the folder of the pages
    source = f"`examples/{notebook.name}`"
    return f"{text.rstrip()}\n\n---\n\nThis page shows {source}, with the outputs that the file holds.\n", {
        name: picture for name, picture in resources["outputs"].items()
    }


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page per notebook, and the pictures of its outputs."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = as_page(notebook)
        files.append(File.generated(config, f"{FOLDER}/{notebook.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{FOLDER}/{name}", content=picture))
    return files
