"""The fields that a task reads from a row, in the words of an error message."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RowForm:
    """What messages say about the fields of a row.

    Args:
        task: Name of the task; empty if the task is not known.
        names: Names of the fields: first the text, last the answer. Empty if they are not known.
        num_answers: Number of fields of the answer.
        writes: Whether the task writes answers with ``generate``, and has no ``predict``.
        has_windows: Whether the task can read a long text in windows.
    """

    task: str = ""
    names: Sequence[str] = ()
    num_answers: int = 1
    writes: bool = False
    has_windows: bool = False

    @property
    def texts(self) -> Sequence[str]:
        """The fields besides those of the answer."""
        return self.names[: -self.num_answers]

    @property
    def fields(self) -> str:
        """The fields, as they follow the words "a dict"."""
        if self.names:
            return f"with the fields {_in_words(self.names)}"
        if self.task:
            return f"with the fields that {self.task}.encode reads"
        return "such as {'text': ..., 'label': ...}"

    @property
    def advice(self) -> str:
        """A sentence that names the fields; empty if no task is known."""
        without = f"generate needs no {self.names[-1]!r}" if self.writes and self.names else "predict needs no answer"
        return f"{self.task} reads rows {self.fields}; {without}." if self.task else ""

    @property
    def from_texts(self) -> str:
        """Code that makes rows of a list of texts."""
        if self.task and not self.names:
            return "[{NAME: text} for text in texts], where NAME is the field of the text"
        first, *others = self.texts or ("text",)
        return f"[{{{', '.join([f'{first!r}: text', *(f'{name!r}: ...' for name in others)])}}} for text in texts]"


#: Stands for rows of an unknown task.
ANY_FORM = RowForm()


def form_for(encode_row: Callable[..., Any]) -> RowForm:
    """Return the form of the rows that a method ``encode`` of a task reads.

    Args:
        encode_row: The method. Any other function gives :data:`ANY_FORM`.

    Example:
        >>> from scalabl_pyro.data.row_form import form_for
        >>> form_for(lambda row: row).fields
        "such as {'text': ..., 'label': ...}"
    """
    task = getattr(encode_row, "__self__", None)
    names = getattr(task, "row_fields", None)
    if names is None:
        return ANY_FORM
    writes = bool(getattr(task, "scores_only", False))
    has_windows = "windows" in getattr(task, "options", ()) and getattr(task, "text_pair", None) is None
    return RowForm(type(task).__name__, tuple(names), getattr(task, "num_answers", 1), writes, has_windows)


def _in_words(names: Sequence[str]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} and {last}" if first else last
