"""What a search tries: ranges and lists of values for arguments of ``fit``, by name."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._errors import describe, is_number, nearest
from .fit import fit
from .option_groups import GROUPS

#: Arguments of ``fit`` that a search cannot change, with the reason.
FIXED = {
    "blora": "it is what all trials train",
    "task": "it is what all trials train",
    "train_data": "trials with other rows cannot be compared",
    "eval_data": "trials with other rows cannot be compared",
    "num_data": "it is the number of the training rows",
    "seed": "the best of several seeds is luck: fit the best setting with several seeds afterwards",
    "evaluation": "trials that are scored in other ways cannot be compared",
    "checkpoint": "a trial is not resumed",
    "checkpoint_dir": "a trial is not resumed",
    "callbacks": "they do not change the result",
    "progress": "it does not change the result",
    "reset": "each trial starts afresh",
}


@dataclass(frozen=True)
class Range:
    """All numbers between two positive ones, at equal density of their logarithms.

    Attributes:
        low: Smallest value.
        high: Largest value.
        is_whole: Whether the values are whole numbers.
    """

    low: float
    high: float
    is_whole: bool

    def draw(self, random: np.random.Generator) -> float | int:
        """Draw a value."""
        value = math.exp(random.uniform(math.log(self.low), math.log(self.high)))
        return round(value) if self.is_whole else float(value)


Space = dict[str, Range | list[Any]]


def search_space(search: Mapping[str, Any]) -> Space:
    """Read what a user wants to search.

    Args:
        search: By the name of an argument of ``fit``, or ``"optimizer.lr_scale"`` for an option of a group: two
            positive numbers ``(low, high)``, or a list of values.

    Returns:
        A range or a list per name.

    Raises:
        TypeError: ``search`` must be a dict, and its values pairs of numbers or lists.
        ValueError: A name is unknown or cannot be searched, or a range or list is empty.

    Example:
        >>> search_space({"lr": (1e-3, 1e-2), "num_steps": [100, 300]})
        {'lr': Range(low=0.001, high=0.01, is_whole=False), 'num_steps': [100, 300]}
    """
    if not isinstance(search, Mapping):
        raise TypeError(f'search is {describe(search)}, expected a dict such as {{"lr": (1e-3, 1e-2)}}.')
    if not search:
        raise ValueError('search is empty: name what to search, such as {"lr": (1e-3, 1e-2)}.')
    return {_known(name): _values(name, given) for name, given in search.items()}


def _known(name: str) -> str:
    allowed = [n for n in inspect.signature(fit).parameters if n not in FIXED]
    group, _, option = name.partition(".") if isinstance(name, str) else ("", "", "")
    if option and group in GROUPS and group not in FIXED:
        allowed = [f"{group}.{n}" for n in inspect.signature(GROUPS[group]).parameters]
    if name in FIXED:
        raise ValueError(f"search has {name!r}, which cannot be searched: {FIXED[name]}.")
    if name not in allowed:
        raise ValueError(f"search has {name!r}, which is no argument of fit. {nearest(str(name), allowed)}")
    return name


def _values(name: str, given: Any) -> Range | list[Any]:
    if isinstance(given, list):
        if not given:
            raise ValueError(f"search[{name!r}] is an empty list: give the values to try.")
        return list(given)
    if not (isinstance(given, tuple) and len(given) == 2 and all(map(is_number, given))):
        raise TypeError(
            f"search[{name!r}] is {describe(given)}, expected two numbers (low, high), or a list of the values to try."
        )
    low, high = given
    if not 0 < low < high < math.inf:
        raise ValueError(f"search[{name!r}]=({low!r}, {high!r}): expected two finite numbers with 0 < low < high.")
    return Range(low, high, is_whole=isinstance(low, int) and isinstance(high, int))


def arguments_of(chosen: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Join chosen values with the other arguments of ``fit``; ``"optimizer.warmup"`` goes into the group.

    Example:
        >>> arguments_of({"lr": 1e-3, "optimizer.warmup": 0.1}, {"num_steps": 100})
        {'num_steps': 100, 'lr': 0.001, 'optimizer': {'warmup': 0.1}}
    """
    joined = dict(options)
    for name, value in chosen.items():
        group, _, option = name.partition(".")
        if not option:
            joined[name] = value
            continue
        before = joined.get(group) or {}
        known = before if isinstance(before, Mapping) else {n: getattr(before, n) for n in vars(before)}
        joined[group] = {**known, option: value}
    return joined


def default_of(name: str, options: Mapping[str, Any]) -> Any:
    """Return the value that ``fit`` would use if nothing was searched."""
    group, _, option = name.partition(".")
    if not option:
        return options.get(name, inspect.signature(fit).parameters[name].default)
    given = options.get(group) or {}
    if isinstance(given, Mapping):
        return given.get(option, inspect.signature(GROUPS[group]).parameters[option].default)
    return getattr(given, option)
