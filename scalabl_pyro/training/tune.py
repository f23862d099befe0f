"""A short search over arguments of ``fit``, judged by rows that are held out."""

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from .._arguments import check_role, known_arguments
from .._display import Summarized
from .._errors import check_count
from .._process.random_state import as_seed, derive_seed
from ..distributed.processes import current_processes
from ..model.bayesian_lora import BayesianLoRA
from ..tasks import Task
from ..tasks.base import copy_task
from .fit import fit
from .fresh_start import choose_start
from .held_out_scores import EVAL, NLL
from .history import KEPT
from .result import FitResult, TrainingError
from .search_sampler import Sampled
from .search_space import FIXED, Space, arguments_of, search_space

logger = logging.getLogger(__name__)

#: What is searched if the caller does not say: rates around the default, and numbers of steps.
SEARCH = {"lr": (2e-3, 3.2e-2), "num_steps": [100, 300, 1000]}
#: Arguments of ``fit`` that a training changes or keeps a state in.
KEPT_BY_FIT = ("guide", "elbo")
#: Number of different values from which on the best one can be called the end of what was tried.
ENOUGH = 3


@dataclass(frozen=True, repr=False)
class TuneResult(Summarized):
    """Trials of a search, and the best one.

    Attributes:
        best: Arguments of :func:`scalabl_pyro.fit` of the best trial, those that were searched.
        trials: One line per trial: the values, ``eval_nll`` and other scores of the held-out rows, ``step`` of the
            state that was scored, ``seconds``, ``state`` (``"complete"`` or ``"failed"``) and ``reason`` of a failure.
        notes: Sentences on what the search left open, such as a best value at the end of its range.

    Example:
        >>> found = scalabl_pyro.tune(blora, task, rows[:6], rows[6:], search={"lr": [1e-3, 1e-2]}, num_steps=3)
        >>> result = scalabl_pyro.fit(blora, task, rows, reset=True, num_steps=3, **found.best)
    """

    best: dict[str, Any]
    trials: pd.DataFrame
    notes: tuple[str, ...] = ()

    def _summary(self) -> dict[str, object]:
        complete = self.trials[self.trials["state"] == "complete"]
        numbers: dict[str, object] = {"trials": len(self.trials), "failed": len(self.trials) - len(complete)}
        return {"best": self.best, "eval_nll": round(float(complete[NLL].min()), 4)} | numbers


@known_arguments
def tune(
    blora: BayesianLoRA,
    task: Task,
    train_data: Any,
    eval_data: Any,
    *,
    search: Mapping[str, Any] | None = None,
    num_trials: int = 8,
    sampler: Any = "random",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> TuneResult:
    """Try several settings of ``fit``, and choose the one with the lowest NLL of held-out rows.

    Each trial is ``fit(blora, task, train_data, eval_data=eval_data, reset=True, seed=seed, ...)``, so it can be run
    again alone. The first trial has the values that ``fit`` would use, where ``search`` holds them. Afterwards
    ``blora``, ``task`` and the random states are as before. The lowest NLL of several trials is too good to be true for
    new rows: report scores of rows that no trial has seen.

    Args:
        blora: The LLM.
        task: The likelihood.
        train_data: Training rows, in any form that ``fit`` takes.
        eval_data: Held-out rows with answers, which judge the trials. Do not pass test rows.
        search: By the name of an argument of ``fit``: a tuple ``(low, high)`` of two positive numbers, drawn at equal
            density of their logarithms (whole numbers if both are), or a list of values. ``"optimizer.lr_scale"`` names
            an option of a group. Default: ``{"lr": (2e-3, 3.2e-2), "num_steps": [100, 300, 1000]}``.
        num_trials: Number of trials. No values are tried twice, so lists may end a search earlier.
        sampler: ``"random"``; ``"optuna"`` for its TPE sampler, which draws the first half of the
            trials at random, 10 at most; or a sampler object of Optuna.
        seed: Seed of the choice of values, and of every trial.
        progress: Whether to show a bar over the trials.
        options: Further arguments of :func:`scalabl_pyro.fit`, the same in all trials.

    Returns:
        The best values and all trials. Ctrl-C ends the search, and returns the trials that were completed.

    Raises:
        TypeError: An argument is another kind of object.
        ValueError: A name or a range cannot be searched, or several processes run.
        TrainingError: No trial has a finite NLL. The message says why each failed.
        ImportError: ``sampler`` needs Optuna, which is not installed.

    Example:
        >>> found = scalabl_pyro.tune(blora, task, rows[:6], rows[6:], search={"lr": [1e-3, 1e-2]}, num_steps=3)
        >>> list(found.best)
        ['lr']

    References:
        Bergstra and Bengio, Random search for hyper-parameter optimization, JMLR 2012.
    """
    call = "tune(blora, task, train_data, eval_data)"
    check_role("blora", blora, "blora", call=call)
    check_role("task", task, "task", call=call)
    check_count(num_trials=num_trials)
    if current_processes().size > 1:
        raise ValueError("tune runs in one process: run it in one, and pass its result to fit in several.")
    if fixed := sorted({"eval_data", "checkpoint_dir", "checkpoint", "reset"} & set(options)):
        raise ValueError(f"{fixed[0]}= cannot be passed to tune: {FIXED[fixed[0]]}.")
    space, seed = search_space(SEARCH if search is None else search), as_seed(seed)
    rows = [list(data) if isinstance(data, Iterator) else data for data in (train_data, eval_data)]
    sampled = Sampled(space, options, num_trials=num_trials, sampler=sampler, seed=derive_seed(seed, "search"))
    trials: list[dict[str, Any]] = []
    with _as_before(blora, task):
        choose_start(blora, task, reset=True)
        starts = copy_task(task), copy.deepcopy(blora.prior), options
        try:
            for _ in tqdm(range(num_trials), desc="tune", disable=not progress):
                chosen = sampled.next(trials)
                if chosen is None:
                    break
                trials.append(_run(blora.adapter, starts, rows, chosen, seed=seed))
                sampled.tell(trials[-1])
                logger.info("trial %d: %s", len(trials) - 1, {k: v for k, v in trials[-1].items() if v is not None})
        except KeyboardInterrupt:
            if not any(trial["state"] == "complete" for trial in trials):
                raise
            logger.warning("interrupted after %d complete trials; the best of them is returned", len(trials))
    return _result(trials, space)


def _run(
    adapter: Any, starts: tuple[Any, ...], rows: list[Any], chosen: dict[str, Any], *, seed: int
) -> dict[str, Any]:
    """Train once from the start. A training that is not finite is a trial that failed."""
    task, prior, options = starts
    blora = BayesianLoRA(adapter, prior=copy.deepcopy(prior))
    arguments = arguments_of(chosen, options)
    own = {name: copy.deepcopy(arguments[name]) for name in KEPT_BY_FIT if name in arguments}
    begin = time.perf_counter()
    try:
        more: dict[str, Any] = {"eval_data": rows[1], "seed": seed, "progress": False, "reset": True}
        scores = _scores(fit(blora, copy_task(task), rows[0], **more, **arguments | own).complete("a trial"))
    except TrainingError as error:
        scores = {NLL: None, "state": "failed", "reason": str(error)}
    return {**chosen, **scores, "seconds": round(time.perf_counter() - begin, 2)}


def _scores(result: FitResult) -> dict[str, Any]:
    """Scores of the state that the posterior holds."""
    evaluations = result.evaluations
    if evaluations.empty:
        return {NLL: None, "state": "failed", "reason": "a callback ended the training before the first evaluation"}
    is_kept = evaluations[KEPT].to_numpy(dtype=bool)
    last = {str(k): v for k, v in evaluations.to_dict("records")[is_kept.argmax() if is_kept.any() else -1].items()}
    scores = {name: float(value) for name, value in last.items() if name.startswith(EVAL)}
    if not np.isfinite(scores[NLL]):
        return {NLL: None, "state": "failed", "reason": "the NLL of the held-out rows is not finite"}
    return scores | {"step": int(last["step"]), "state": "complete", "reason": None}


def _result(trials: list[dict[str, Any]], space: Space) -> TuneResult:
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        reasons = "; ".join(f"{ {name: t[name] for name in space} }: {t['reason']}" for t in trials)
        raise TrainingError(f"No trial of {len(trials)} has a finite NLL. {reasons}")
    best = min(complete, key=lambda trial: trial[NLL])
    notes = tuple(filter(None, (_at_an_end(name, best[name], [t[name] for t in complete]) for name in space)))
    for note in notes:
        logger.warning("%s", note)
    columns = [*space, *[name for name in complete[0] if name not in space and name not in ("state", "reason")]]
    frame = pd.DataFrame(trials, columns=[*columns, "state", "reason"])
    frame.index.name = "trial"
    return TuneResult(arguments_of({name: best[name] for name in space}, {}), frame, notes)


def _at_an_end(name: str, best: Any, tried: list[Any]) -> str | None:
    """Say so if the best number is the smallest or the largest of those that were tried."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in tried):
        return None
    if len(set(tried)) < ENOUGH or min(tried) < best < max(tried):
        return None
    end, way = ("largest", "higher") if best == max(tried) else ("smallest", "lower")
    return f"The best {name}, {best:.3g}, is the {end} one that was tried. A {way} one may be better: widen the range."


@contextmanager
def _as_before(blora: BayesianLoRA, task: Task) -> Iterator[None]:
    """Put factors, heads, latents, prior and task back to their present values afterwards."""
    adapter = blora.adapter
    modules = (blora.point_estimates, blora.prior, task)
    before = [
        (tensor, tensor.detach().clone()) for module in modules for tensor in module.state_dict(keep_vars=True).values()
    ]
    loc = adapter.loc.detach().clone()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        adapter.rest_at(loc)
