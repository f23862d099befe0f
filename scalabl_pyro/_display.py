"""Short text and a small table for objects that hold large arrays."""

import html
from collections.abc import Mapping

#: Longest value that is shown, in characters.
MAX_CHARS = 80


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
        facts = _shown(self._summary()).items()
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts)
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def _shown(facts: Mapping[str, object]) -> dict[str, str]:
    texts = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in facts.items()}
    return {k: text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 3] + "..." for k, text in texts.items()}
