"""Looks back at a training that ended: is it worse than at its start, and does it predict one class for all rows?"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..data.batch import Batch
from ..lora.sharding import is_sharded
from ..model.passes import Passes
from ..posterior.posterior import Posterior

#: Largest number of steps at either end that are averaged.
WINDOW = 50
#: Smallest number of steps whose spread gives a standard error.
MIN_WINDOW = 4
#: The same where the start is a single step.
MIN_WINDOW_OF_FIRST_STEP = 10
#: Number of standard errors by which an end must be higher than the start.
STANDARD_ERRORS = 5.0
#: Shorter trainings are not judged by their predictions.
MIN_STEPS = 20
#: Number of recent rows that are predicted.
MAX_ROWS = 64
#: Largest chance of equal classes in all recent rows that counts as suspicious.
MAX_CHANCE = 1e-3


def ended_worse(history: Sequence[Mapping[str, float]]) -> str | None:
    """Compare loss and NLL of the last quarter of the steps (50 at most) with the first 6 %, and with the first step.

    Rates are small in the first steps. If they are far too high even then, only the first step shows the start.

    A rise counts if it is larger than 5 standard errors of the difference and than 1 % of the start, or if the end is
    10 times the start. The loss is left out if the weight of the KL changed.

    Args:
        history: Rows of all steps.

    Returns:
        A sentence, or None if neither rose.
    """
    if len(history) < 2:
        return None
    num_last = max(min(len(history) // 4, WINDOW), 1)
    num_first = max(min(round(0.06 * len(history)), WINDOW), 1)
    is_constant = len({row["kl_weight"] for row in history}) == 1
    found = []
    for name in ("loss", "nll") if is_constant else ("nll",):
        values = np.array([row[name] for row in history])
        last = values[-num_last:]
        starts = [values[:count] for count in sorted({num_first, 1}) if _is_above(values[:count], last)]
        if starts:
            found.append(f"{'NLL' if name == 'nll' else name} {starts[0].mean():.4g} -> {last.mean():.4g}")
    if not found:
        return None
    return (
        f"The training ended worse than it began ({', '.join(found)} nats per example, the last {num_last} steps). "
        "Lower the learning rates lr and lr_A, or check the answers of the rows."
    )


def _is_above(first: np.ndarray, last: np.ndarray) -> bool:
    """Whether the end of a training is higher than its start by more than its noise."""
    start, end = first.mean(), last.mean()
    if last.min() > 10 * max(abs(start), 1.0):  # its own spread would hide such a rise
        return True
    if len(last) < (MIN_WINDOW if len(first) > 1 else MIN_WINDOW_OF_FIRST_STEP):
        return False
    spread = max(last.std(ddof=1), first.std(ddof=1) if len(first) >= MIN_WINDOW else 0.0)
    error = spread * math.sqrt(1 / len(first) + 1 / len(last))
    return bool(end - start > max(STANDARD_ERRORS * error, 0.01 * abs(start)))


@torch.no_grad()
def predicts_one_class(posterior: Posterior, recent: Sequence[Batch], *, rows_per_pass: int | None) -> str | None:
    """Predict the rows of the last batches with the posterior mean.

    Nothing is said where this can be chance: where most of these rows have one answer, or where they are few.

    Args:
        posterior: The posterior.
        recent: The last batches, the newest one last.
        rows_per_pass: Rows per forward pass; None for whole batches.

    Returns:
        A sentence, or None if the predictions differ.
    """
    classes = posterior.task.classes
    batches = _last_rows([batch for batch in recent if batch.target is not None])
    if classes is None or not batches or is_sharded(posterior.adapter.module):  # one process alone must not run it
        return None
    targets = torch.cat([batch.target.cpu() for batch in batches if batch.target is not None])
    share = targets.unique(return_counts=True)[1].max().item() / len(targets)
    if share ** len(targets) > MAX_CHANCE:
        return None
    parts = [part for batch in batches for part in batch.split(rows_per_pass or len(batch))]
    task, llm, s = posterior.task, posterior.llm(), posterior.mean().to(posterior.adapter.device)

    def answers(batch: Batch) -> torch.Tensor:
        outputs = task.outputs(llm, batch, s.view(1, 1, -1))
        return task.distribution(outputs, batch.without_target()).logits[0].argmax(-1).cpu()

    try:
        predicted = torch.cat(Passes(posterior.adapter, parts).map(answers))
    except (AttributeError, ValueError, torch.OutOfMemoryError):  # no logits, not finite, or no memory for the check
        return None
    if len(predicted.unique()) > 1:
        return None
    most = 100 * share
    return (
        f"The posterior mean predicts one class, {classes[int(predicted[0])]!r}, for all of the last {len(targets)} "
        f"training rows, of which at most {most:.0f} % have one answer. It has not learned to tell the classes apart: "
        "change lr, take more steps, or check prompt and answers."
    )


def _last_rows(recent: Sequence[Batch]) -> list[Batch]:
    """The newest batches, up to :data:`MAX_ROWS` rows."""
    chosen: list[Batch] = []
    for batch in reversed(recent):
        room = MAX_ROWS - sum(map(len, chosen))
        if room <= 0:
            break
        chosen.append(batch.split(room)[0] if len(batch) > room else batch)
    return chosen
