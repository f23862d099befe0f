"""Classes: the class that a label names, and the comparison of two lists of classes.

A data set, a task and a model each have an order of the classes. An index means nothing without its list, so an index
from a data set whose column has names (:class:`ClassIndex`) is matched by name.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from numbers import Real
from typing import Any

from .._errors import nearest
from .._values import integer, is_missing, number, plain, shown

logger = logging.getLogger(__name__)

ClassName = str | int | float | bool
"""Name of a class as rows hold it."""

#: Label of a row whose class is not known, as in the test sets of GLUE and other public benchmarks.
UNLABELED = -1


class ClassIndex(int):
    """Index of a class, with the names of its data set's ``ClassLabel`` column. It is equal to the plain index.

    Attributes:
        names: Names of all classes of the column, in its order.

    Example:
        >>> label = ClassIndex(0, ("spam", "ham"))
        >>> label == 0, label.name
        (True, 'spam')
    """

    names: tuple[str, ...]

    def __new__(cls, index: int, names: Iterable[str]) -> "ClassIndex":
        """Make an index of ``names``."""
        self = super().__new__(cls, index)
        self.names = tuple(names)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return ClassIndex, (int(self), self.names)

    @property
    def name(self) -> str | None:
        """Name of the class; None for an index that has none, such as -1."""
        return self.names[self] if 0 <= self < len(self.names) else None


def as_classes(classes: Any) -> tuple[ClassName, ...]:
    """Check the names of the classes of a task.

    Args:
        classes: Two or more texts, or two or more numbers or truth values that stand in the rows.

    Returns:
        The names as Python values.

    Raises:
        ValueError: There are fewer than two, two are equal, they are of several types, or they are a set or a dict.

    Example:
        >>> as_classes(["spam", "ham"]), as_classes([True, False])
        (('spam', 'ham'), (True, False))
    """
    if isinstance(classes, set | frozenset | Mapping):
        raise ValueError(_no_order(classes))
    if isinstance(classes, str | bytes) or not isinstance(classes, Iterable):
        raise ValueError(f"classes={classes!r}: name at least two classes, such as ['no', 'yes'].")
    names = tuple(str(name) if isinstance(name := plain(given), str) else name for given in classes)
    if len(names) < 2:
        raise ValueError(f"classes={classes!r}: name at least two classes, such as ['no', 'yes'].")
    if wrong := [name for name in names if is_missing(name) or not isinstance(name, str | int | float | bool)]:
        raise ValueError(f"classes={classes!r}: {shown(wrong[0])} is not a name. Give texts, numbers or truth values.")
    if len({_kind(name) for name in names}) > 1:
        raise ValueError(f"classes={classes!r} mixes texts, numbers and truth values: give names of one type.")
    if len(set(map(str, names))) < len(names) or len(set(names)) < len(names):
        raise ValueError(f"classes={classes!r}: a name occurs twice. Give each class its own name.")
    return names


def class_index(label: Any, classes: Sequence[ClassName], *, what: str = "label") -> int | None:
    """Return the index of the class that a label names.

    A label with a type of the classes is a name. Beside classes that are texts, a whole number is an index, and -1
    means that the class is not known. A :class:`ClassIndex` is matched by its name.

    Args:
        label: Label in a row.
        classes: Names of the classes, see :func:`as_classes`.
        what: Name of the field, for messages.

    Returns:
        The index; None if the label is missing.

    Raises:
        ValueError: The label names no class, or could mean two.

    Example:
        >>> class_index("ham", ("spam", "ham")), class_index(0, ("spam", "ham")), class_index(2, (1, 2, 3))
        (1, 0, 1)
    """
    if is_missing(label):
        return None
    if isinstance(label, ClassIndex):
        return _from_data_set(label, classes, what)
    given, names = plain(label), [str(name) for name in classes]
    if isinstance(given, str):
        if given not in names:
            is_number = number(given, from_text=True) is not None
            hint = " It is a number as a text: convert the column to numbers." if is_number else ""
            raise ValueError(f"{what} {label!r} is not a class. {nearest(given, names)}{hint}")
        return names.index(given)
    whole = integer(given)
    if _kind(classes[0]) != "text":
        if isinstance(given, Real | Decimal) and given in classes:
            return [bool(name == given) for name in classes].index(True)
        if whole == UNLABELED:
            return None
        raise ValueError(
            f"{what} {shown(label)} is not one of the classes {_listed(classes)}. Give one of them, or {UNLABELED} for "
            "an unknown class."
        )
    if isinstance(given, bool):
        if str(given) in names:
            return names.index(str(given))
        raise ValueError(
            f"{what} {label!r} is a truth value, but the classes are {_listed(classes)}, and nothing says which of "
            "them is True: name the classes by their values, classes=[False, True] in the order of the model's outputs."
        )
    if whole is None or (whole not in range(len(names)) and str(whole) not in names and whole != UNLABELED):
        raise ValueError(
            f"{what} {shown(label)} is outside the {len(names)} classes (0 to {len(names) - 1}): give one index or one "
            f"name. {UNLABELED} stands for an unknown class."
        )
    if str(whole) in names and names.index(str(whole)) != whole:
        raise ValueError(
            f"{what} {whole} could be the class named {str(whole)!r} or the class with index {whole}: the classes are "
            f"{_listed(classes)}. Give the classes as numbers, classes=[1, 2, ...], and labels are matched by value."
        )
    return None if whole == UNLABELED else whole


def choice_index(answer: Any, labels: Sequence[str], choices: Sequence[str]) -> int | None:
    """Return the index of the choice that an answer names.

    A whole number is an index, and -1 means that the answer is not known. A text is the label of a choice, or the text
    of exactly one choice.

    Args:
        answer: Answer in a row.
        labels: Labels of all choices that a row may have.
        choices: Texts of the choices of the row.

    Returns:
        The index; None if the answer is missing.

    Raises:
        ValueError: The answer names no choice, or could mean two.

    Example:
        >>> [choice_index(answer, "ABC", ["red", "green"]) for answer in (1, "B", "green", -1)]
        [1, 1, 1, None]
    """
    if is_missing(answer):
        return None
    own = list(labels[: len(choices)])
    named = answer.name if isinstance(answer, ClassIndex) else str(given) if _is_word(given := plain(answer)) else None
    if named is not None:
        found = {i for i in range(len(choices)) if named in (own[i], choices[i])}
        if len(found) == 1:
            return found.pop()
        if len(found) > 1:
            raise ValueError(
                f"answer={answer!r} names the choices {sorted(found)}, by their label or text: give the index."
            )
    whole = None if isinstance(plain(answer), str) else integer(answer)
    if whole == UNLABELED:
        return None
    if whole is None or whole not in range(len(choices)):
        raise ValueError(
            f"answer={answer!r} is outside the {len(choices)} choices: give an index from 0 to {len(choices) - 1}, "
            f"a label from {own[0]} to {own[-1]}, or the text of a choice. {UNLABELED} stands for an unknown answer."
        )
    return whole


def check_order(classes: Sequence[Any], others: Sequence[Any], *, whose: str, advice: str) -> bool:
    """Check that two lists do not hold the same classes in different orders.

    Args:
        classes: Names of the classes of a task.
        others: Names of the classes of a model or a data set.
        whose: Who has the other names, for the message.
        advice: What to do, for the message.

    Returns:
        Whether the two lists share a name, so that their agreement says something. Case does not count.

    Raises:
        ValueError: A name stands at different positions.

    Example:
        >>> check_order(["no", "yes"], ["NO", "YES"], whose="the model", advice="")
        True
    """
    mine, theirs = ([str(name).casefold() for name in names] for names in (classes, others))
    shared = set(mine) & set(theirs)
    if any(mine.index(name) != theirs.index(name) for name in shared):
        raise ValueError(
            f"The task has the classes {_listed(classes)}, but {whose} has {_listed(others)}: the same names in "
            f"different orders. {advice}"
        )
    return bool(shared)


def _no_order(classes: Any) -> str:
    """Say that a set or a dict does not give the order of the classes, and give the list where a dict holds indices."""
    if not isinstance(classes, Mapping):
        return f"classes={classes!r} is a set, which has no order. Give a list in the order of the model's outputs."
    names = next(
        (
            [by_index[i] for i in range(len(classes))]
            for by_index in (dict(classes), {index: name for name, index in classes.items()})
            if set(by_index) == set(range(len(classes)))
        ),
        "['no', 'yes']",
    )
    return f"classes={classes!r} is a dict. Give a list in the order of the model's outputs, such as classes={names}."


def _from_data_set(label: ClassIndex, classes: Sequence[ClassName], what: str) -> int | None:
    """Match the index of a data set's column by its name, or by its position where all names differ."""
    if label.name is None:
        return class_index(int(label), classes, what=what)
    if label.name in (exact := [str(name) for name in classes]):
        return exact.index(label.name)
    mine, theirs = ([name.casefold() for name in names] for names in (exact, label.names))
    if label.name.casefold() in mine:
        return mine.index(label.name.casefold())
    if set(mine) & set(theirs) or _kind(classes[0]) != "text" or label >= len(mine):
        raise ValueError(
            f"{what} {int(label)} is {label.name!r} in the data set, which is not a class of the task. The data set "
            f"has the classes {_listed(label.names)}, the task {_listed(classes)}: use the same names."
        )
    _say_by_position(_listed(label.names), _listed(classes))
    return int(label)


@lru_cache(maxsize=256)  # once for each pair of lists, not once per row
def _say_by_position(theirs: str, mine: str) -> None:
    logger.warning(
        "The data set has the classes %s, the task %s. They share no name, so they are matched by position. "
        "Check that both lists have the same order.",
        theirs,
        mine,
    )


def _is_word(value: Any) -> bool:
    return isinstance(value, str | bool)


def _kind(name: ClassName) -> str:
    return "text" if isinstance(name, str) else "truth value" if isinstance(name, bool) else "number"


def _listed(names: Sequence[Any], limit: int = 10) -> str:
    items = [f"{i}: {name!r}" for i, name in enumerate(names[:limit])]
    return "(" + ", ".join(items) + (", ...)" if len(names) > limit else ")")
