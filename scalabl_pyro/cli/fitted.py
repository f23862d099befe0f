"""What the command ``fit`` says at its end: rows, steps, held-out scores, and whether the training was long enough."""

from pathlib import Path
from typing import Any

import pandas as pd

from ..storage.json_values import records
from ..tasks.base import Task
from ..training.history import KEPT
from ..training.result import FitResult
from .held_out import HeldOut
from .terminal import say, say_json


def tell(result: FitResult, task: Task, held_out: HeldOut, *, out: Path, history: Path | None, as_json: bool) -> None:
    """Print what was learned.

    Args:
        result: What ``fit`` returned.
        task: The task.
        held_out: The rows.
        out: Directory of the posterior.
        history: File of the history, if one was written.
        as_json: Whether to print JSON.
    """
    nll = result.history["nll"]
    tenth = max(len(nll) // 10, 1)
    first, last = float(nll[:tenth].mean()), float(nll[-tenth:].mean())
    if as_json:
        facts: dict[str, Any] = {"rows": len(held_out.train), "steps": len(nll), "task": type(task).__name__}
        facts |= {"guessed": task.guessed, "nll_first_tenth": first, "nll_last_tenth": last}
        facts |= {"held_out": _scores(result, held_out), "settled": result.settled, "warnings": list(result.warnings)}
        say_json(facts | {"out": str(out), "history": None if history is None else str(history)})
        return
    say(f"{type(task).__name__}: {task.guessed}")
    say(f"{len(held_out.train)} rows, {len(nll)} steps. NLL per row: {first:.3f} in the first tenth, {last:.3f} in "
        "the last.")  # fmt: skip
    if held_out.rows is not None:
        _tell_scores(result, held_out)
    for warning in result.warnings:
        say(f"warning: {warning}")
    say(result.settled.replace("pass patience=", "pass --patience"))
    if history is not None:
        say(f"History saved: {history}")
    say(f"Posterior saved: {out}")


def _tell_scores(result: FitResult, held_out: HeldOut) -> None:
    say(f"Held out: {len(held_out.rows or [])} rows, {held_out.origin}.")
    scores = result.evaluations
    if scores.empty:
        say("They were not scored, because the training ended before the first evaluation.")
        return
    shown = scores.drop(columns=["nll", KEPT]).assign(step=scores["step"] + 1).rename(columns={"step": "steps"})
    say(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    evaluation = _evaluation(result)
    end = " The training stopped early." if evaluation["stopped_early"] else ""
    kept = "before the first step" if evaluation["kept_step"] is None else f"after {evaluation['kept_step'] + 1} steps"
    why = evaluation["why"].replace("fit(patience=...)", "--patience")
    say(f"The posterior is that {kept}: {why}.{end}")


def _scores(result: FitResult, held_out: HeldOut) -> dict[str, Any] | None:
    """The held-out rows and their scores, for JSON; None without held-out rows."""
    if held_out.rows is None:
        return None
    facts = {"rows": len(held_out.rows), "from": held_out.origin} | _evaluation(result)
    scores: pd.DataFrame = result.evaluations.drop(columns="nll")
    return facts | {"evaluations": records(scores)}


def _evaluation(result: FitResult) -> dict[str, Any]:
    """What the posterior says of the evaluations."""
    found = result.posterior.provenance["evaluation"]
    return {name: found[name] for name in ("kept_step", "why", "stopped_early")}
