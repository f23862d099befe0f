"""Names of classes that a reader takes for one name."""

import unicodedata
from collections.abc import Iterable
from typing import Any


def twins(names: Iterable[Any]) -> list[str]:
    """Return the first group of names that differ only in capital letters, spaces, or the Unicode form of a letter.

    Args:
        names: Names of classes. Names that are not texts have no twins.

    Example:
        >>> twins(["yes", "no", "Yes "]), twins(["yes", "no"])
        (['yes', 'Yes '], [])
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        if isinstance(name, str):
            groups.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    return next((group for group in groups.values() if len(group) > 1), [])
