"""The names that a model gives its classes, compared with those of a task."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from .labels import ClassName, check_order

logger = logging.getLogger(__name__)


def check_model_names(classes: Sequence[ClassName], id2label: Any) -> None:
    """Compare the classes of a task with the names that a model gives its outputs, ``config.id2label``.

    Args:
        classes: Names of the classes of a task.
        id2label: Names of the outputs by index. Names such as ``LABEL_0`` say nothing.

    Raises:
        ValueError: They hold a name at different positions.

    Example:
        >>> check_model_names(["no", "yes"], {0: "NO", 1: "YES"})
    """
    names = [] if not isinstance(id2label, Mapping) else [id2label.get(i) for i in range(len(id2label))]
    if len(names) != len(classes) or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names):
        return
    advice = f"Use classes={names}, the order of the model's outputs, or set model.config.id2label."
    check_order(classes, names, whose="the model's config.id2label", advice=advice)
    if any(str(mine).casefold() != str(theirs).casefold() for mine, theirs in zip(classes, names, strict=True)):
        _say_other_names(str(names), str(list(classes)))


def model_order(classes: Sequence[ClassName], id2label: Any) -> list[int] | None:
    """Return for each output of a model the index of its class in ``classes``; None if the names differ.

    Args:
        classes: Names of the classes.
        id2label: Names of the outputs by index, ``config.id2label``. Capital letters do not count.

    Example:
        >>> model_order(["no", "yes"], {0: "YES", 1: "NO"})
        [1, 0]
    """
    own = [str(name).casefold() for name in classes]
    theirs = [str(id2label.get(i)).casefold() for i in range(len(id2label))] if isinstance(id2label, Mapping) else []
    if len(set(own)) != len(own) or sorted(theirs) != sorted(own):
        return None
    return [own.index(name) for name in theirs]


@lru_cache(maxsize=256)  # once for each pair of lists, not once per pass
def _say_other_names(theirs: str, mine: str) -> None:
    logger.warning(
        "The model's config.id2label has the classes %s, the task %s. They are matched by position. Check that both "
        "lists have the same order.",
        theirs,
        mine,
    )
