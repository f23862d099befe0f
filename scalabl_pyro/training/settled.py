"""Says in one line whether loss, guide and steps of a training had settled at its end, and what to change."""

import pandas as pd

from ..analysis.training_checks import MIN_STEPS, check_guide, check_history
from .held_out_scores import NLL

#: A held-out NLL at the end that is this share above the lowest one, and this number of nats, has risen.
RISE = 0.01


def settled(history: pd.DataFrame, *, num_steps: int, patience: int | None = None) -> str:
    """Say whether a training had settled, and what to change if it had not.

    The findings are those of ``posterior.diagnose(rows, history=result.history)``, and the change of the KL, which
    follows the means and scales of the guide.

    Args:
        history: One row per step that was taken.
        num_steps: Number of steps that the run was to take.
        patience: Patience of the run, if it had one and its posterior is that of the best evaluation.

    Returns:
        One line.

    Example:
        >>> settled(result.history, num_steps=1000)
        'After 1000 steps: loss and guide have settled.'
    """
    taken = 0 if history.empty else int(history["step"].iloc[-1]) + 1
    ended = f"After {taken} steps" if taken >= num_steps else f"Ended after {taken} of {num_steps} steps"
    if len(history) < MIN_STEPS:
        return f"{ended}: too few steps to tell whether the training has settled ({MIN_STEPS} or more can tell)."
    slope, end = check_history(history)
    if end.severity != "ok":
        return f"{ended}: {end.cause} {end.advice}"
    guide = check_guide(history)
    moving = [f for f in (slope, *guide) if f.severity != "ok"]
    facts = [f.cause.rstrip(".") for f in moving] or [f"{'loss and guide have' if guide else 'the loss has'} settled"]
    advice = [moving[-1].advice] if moving else []
    facts, advice = _with_held_out(history, facts, advice, patience)
    return f"{ended}: {'; '.join(facts)}. {' '.join(advice)}".rstrip()


def _with_held_out(
    history: pd.DataFrame, facts: list[str], advice: list[str], patience: int | None
) -> tuple[list[str], list[str]]:
    """Add what the held-out rows say: that their NLL has risen again."""
    if NLL not in history or history[NLL].notna().sum() < 2:
        return facts, advice
    scores = history[history[NLL].notna()]
    nlls = scores[NLL].to_numpy(dtype=float)
    best = int(nlls.argmin())
    if nlls[-1] - nlls[best] <= RISE * max(1.0, abs(nlls[best])):
        return facts, advice
    taken = int(scores["step"].iloc[best]) + 1
    rise = f"the held-out NLL was lowest after {taken} steps ({nlls[best]:.4g}, at the end {nlls[-1]:.4g})"
    if patience is not None:
        return [*facts, rise], ["Fewer steps or a lower lr_A may do better."]
    return [*facts, rise], ["Take fewer steps, lower lr_A, or pass patience= to keep the best evaluation."]
