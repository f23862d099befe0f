"""The columns from which multiple-choice questions are read."""

from collections.abc import Sequence
from typing import Any

from .._values import is_missing, shown
from ..data.rows import Row
from .fields import text_of, texts_of


class ChoiceColumns:
    """Names of the fields of a question, its choices and its answer.

    Args:
        question: Name of the field of the question.
        choices: Name of the field of a list of choices, or one name per choice. The last fields of a row may be empty:
            such a row has fewer choices.
        target: Name of the field of the answer.

    Raises:
        ValueError: A name is not a text, or there are fewer than two fields of choices.

    Example:
        >>> from scalabl_pyro.tasks.choice_columns import ChoiceColumns
        >>> columns = ChoiceColumns("sentence", ("option1", "option2"), "answer")
        >>> columns.choices_of({"sentence": "_ is blue.", "option1": "Grass", "option2": "The sky"})
        ['Grass', 'The sky']
    """

    def __init__(self, question: str, choices: str | Sequence[str], target: str) -> None:
        for name, value in {"question": question, "target": target}.items():
            check_column(name, value)
        several = isinstance(choices, list | tuple)
        if not (
            isinstance(choices, str) or (several and len(choices) > 1 and all(isinstance(c, str) for c in choices))
        ):
            raise ValueError(
                f"choices={shown(choices)}: expected the name of a field that holds lists, or two or more names of "
                "fields that hold one choice each, such as ('option1', 'option2')."
            )
        self.question, self.target = question, target
        self.choices: str | tuple[str, ...] = choices if isinstance(choices, str) else tuple(choices)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all fields: first the question, last the answer."""
        choices = (self.choices,) if isinstance(self.choices, str) else self.choices
        return (self.question, *choices, self.target)

    def example(self) -> dict[str, Any]:
        """Return a row with two choices, whose texts are question marks."""
        choices = {self.choices: ["?", "?"]} if isinstance(self.choices, str) else dict.fromkeys(self.choices[:2], "?")
        return {self.question: "?", **choices, **dict.fromkeys(self.names[3:-1])}

    def question_of(self, row: Row) -> str:
        """Return the question of a row."""
        return text_of(row, self.question)

    def choices_of(self, row: Row) -> list[str]:
        """Return the choices of a row.

        Raises:
            ValueError: A field does not exist or holds something else, or a choice follows an empty field.
        """
        if isinstance(self.choices, str):
            if isinstance(row.get(self.choices), str):
                raise ValueError(
                    f"{self.choices} must be a list of texts, got a str. A CSV file holds no lists: give each choice a "
                    "field of its own, choices=('option1', 'option2'), or use a .jsonl or .parquet file."
                )
            return texts_of(row, self.choices)
        filled = [name for name in self.choices if not (name in row and is_missing(row[name]))]
        if filled != list(self.choices[: len(filled)]):
            raise ValueError(f"a choice follows an empty one in the fields {list(self.choices)}: fill them in order.")
        return [text_of(row, name) for name in filled]

    def answer_of(self, row: Row) -> Any:
        """Return the answer of a row, None if the row has no such field."""
        return row.get(self.target)


def check_column(name: str, value: Any) -> None:
    """Raise ValueError unless an option is the name of a field.

    Args:
        name: Name of the option.
        value: Its value.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a string, the name of a field of the rows.")
