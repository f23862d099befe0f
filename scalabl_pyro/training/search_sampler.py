"""Chooses the values of each trial of a search: at random, or by a sampler of Optuna."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import describe, is_number
from .held_out_scores import NLL
from .search_space import Range, Space, default_of

#: Number of repeated proposals in a row after which a search ends.
MAX_REPEATS = 200


class Sampled:
    """Chooses the values of the next trial, by our own draws or by Optuna.

    Args:
        space: What to search.
        options: Other arguments of ``fit``.
        num_trials: Number of trials of the search.
        sampler: ``"random"``, ``"optuna"``, or a sampler object of Optuna.
        seed: Seed of the choice.
    """

    def __init__(self, space: Space, options: Mapping[str, Any], *, num_trials: int, sampler: Any, seed: int) -> None:
        self.space = space
        self._at_random = random_values(space, options, seed)
        self.study: Any = None if sampler == "random" else _study(sampler, num_trials, seed)
        self._asked: Any = None
        self._count = 0

    def next(self, tried: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Choose the values of the next trial. None if no values come that were not tried before.

        Args:
            tried: Trials so far, with their values. The same values would give the same training.
        """
        for _ in range(MAX_REPEATS):
            chosen = self._choose()
            same = [trial for trial in tried if all(trial[name] is v or trial[name] == v for name, v in chosen.items())]
            if not same:
                return chosen
            self.tell(same[0])
        return None

    def _choose(self) -> dict[str, Any]:
        count, self._count = self._count, self._count + 1
        if self.study is None:
            return self._at_random(count)
        if count == 0:
            self.study.enqueue_trial(_as_choices(self.space, self._at_random(0)))
        self._asked = self.study.ask()
        return {name: _suggest(self._asked, name, values) for name, values in self.space.items()}

    def tell(self, trial: Mapping[str, Any]) -> None:
        """Tell the score of a trial."""
        if self.study is None:
            return
        import optuna

        if trial["state"] == "complete":
            self.study.tell(self._asked, trial[NLL])
        else:
            self.study.tell(self._asked, state=optuna.trial.TrialState.FAIL)


def _study(sampler: Any, num_trials: int, seed: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"sampler={sampler!r} needs Optuna: pip install optuna, or use 'random'.") from error
    if sampler == "optuna":
        at_random = min(10, -(-num_trials // 2))  # before it learns from the scores
        sampler = optuna.samplers.TPESampler(n_startup_trials=at_random, seed=seed % 2**32)
    if not isinstance(sampler, optuna.samplers.BaseSampler):
        raise TypeError(f"sampler is {describe(sampler)}, expected 'random', 'optuna', or a sampler of Optuna.")
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="minimize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _as_choices(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists are searched by position, because Optuna's categories are plain values only."""
    return {name: _position(space[name], value) for name, value in values.items()}


def _position(values: Any, value: Any) -> Any:
    return next(i for i, v in enumerate(values) if v is value or v == value) if isinstance(values, list) else value


def _suggest(trial: Any, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return values[trial.suggest_categorical(name, list(range(len(values))))]
    suggest: Callable[..., Any] = trial.suggest_int if values.is_whole else trial.suggest_float
    return suggest(name, values.low, values.high, log=True)


def random_values(space: Space, options: Mapping[str, Any], seed: int) -> Callable[[int], dict[str, Any]]:
    """Choose at random. The first trial has the values that ``fit`` would use, where the space holds them.

    Args:
        space: What to search.
        options: Other arguments of ``fit``.
        seed: Seed of the choice.

    Returns:
        A function from the number of a trial to its values. Trial k is the same in a longer search.
    """

    def choose(trial: int) -> dict[str, Any]:
        random = np.random.default_rng([seed, trial])
        drawn = {name: _draw(values, random) for name, values in space.items()}
        return {name: _start(name, space[name], options, drawn[name]) for name in space} if trial == 0 else drawn

    return choose


def _draw(values: Range | Sequence[Any], random: np.random.Generator) -> Any:
    return values.draw(random) if isinstance(values, Range) else values[int(random.integers(len(values)))]


def _start(name: str, values: Range | list[Any], options: Mapping[str, Any], drawn: Any) -> Any:
    default = default_of(name, options)
    if isinstance(values, Range):
        return default if is_number(default) and values.low <= default <= values.high else drawn
    return default if any(default is value or default == value for value in values) else drawn
