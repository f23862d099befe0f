"""Short text and a small table for objects that hold large arrays."""

import html
from collections.abc import Iterable, Mapping

#: Longest value that is shown, in characters, in text and in a table, whose cells can have several lines.
MAX_CHARS, MAX_CELL = 80, 400


class Summarized:
    """Base of classes that show a few facts in place of their arrays.

    Example:
        >>> class Box(Summarized):
        ...     def _summary(self):
        ...         return {"draws": 3}
        >>> Box()
        Box(draws=3)
    """

    def _summary(self) -> Mapping[str, object]:
        """Facts by name, few and short."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in _shown(self._summary()).items())})"

    def _repr_html_(self) -> str:
        """The facts as a table, for notebooks."""
        return html_table(type(self).__name__, self._summary().items())


def html_table(caption: str, facts: Iterable[tuple[str, object]]) -> str:
    """Make a table of facts for notebooks.

    It holds no color and no script, so that it has the colors of the notebook's theme, light or dark.

    Args:
        caption: Text above the table.
        facts: Name and value of each row. Names may repeat.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_text(value, MAX_CELL))}</td></tr>" for name, value in facts
    )
    return f"<table><caption>{html.escape(caption)}</caption>{rows}</table>"


def _shown(facts: Mapping[str, object]) -> dict[str, str]:
    return {name: _text(value, MAX_CHARS) for name, value in facts.items()}


def _text(value: object, limit: int) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
