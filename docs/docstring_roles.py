"""Docstrings of the package name other objects as ``:class:`~path```; the site shows them as links or as code."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`(~?)([\w.]+)`")

#: griffe shows the code of a section "Examples", and takes "Example" for a paragraph of text.
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Rewrite Sphinx roles before mkdocstrings renders a docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object, once griffe has read it."""
        if obj.docstring:
            text = ROLE.sub(_link, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)


def _link(match: re.Match[str]) -> str:
    path = match[2]
    shown = path.rsplit(".", 1)[-1] if match[1] else path
    if not path.startswith("scalabl_pyro."):
        return f"`{shown}`"  # a member of the same class or module
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
