"""Calibration of multiple-choice tasks, from the samples that lm-evaluation-harness logs.

The harness computes accuracy per answer and has no place for a score of all rows such as the ECE, except in the
configuration of each task. The logged samples hold what is needed, for any model.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from ..._arguments import check_path
from ..._errors import check_count
from ...metrics import accuracy, brier, ece
from ...metrics.calibration import NUM_BINS
from ...metrics.scores import mean_nll

logger = logging.getLogger(__name__)

Samples = Mapping[str, Sequence[Mapping[str, Any]]]


def calibration(samples: Any, *, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Compute accuracy, NLL, Brier score and ECE of multiple-choice tasks.

    The probability of a choice is its share in the sum of the probabilities of all choices of its row, as in
    ``brier_score`` of the harness. Choices are not corrected for their length.

    Args:
        samples: What ``simple_evaluate(..., log_samples=True)`` returns, its entry ``"samples"``, or the folder or
            file that ``lm_eval --log_samples --output_path`` wrote.
        num_bins: Number of bins of the ECE.

    Returns:
        One row per task and filter: ``task``, ``filter``, ``num_rows``, ``accuracy``, ``nll`` (nats), ``brier`` (0 to
        2) and ``ece``. Tasks of another kind are left out.

    Raises:
        ValueError: There are no samples of a multiple-choice task, or the right answer of a row is not one of its
            choices.

    Example:
        >>> choices = {"arguments": [("is", " a"), ("is", " b")]}
        >>> samples = [
        ...     {"target": 0, "filtered_resps": [(-1.0, True), (-3.0, False)], **choices},
        ...     {"target": 1, "filtered_resps": [(-2.0, True), (-2.5, False)], **choices},
        ... ]
        >>> calibration({"letters": samples})[["num_rows", "accuracy"]]
           num_rows  accuracy
        0         2       0.5
    """
    check_count(num_bins=num_bins)
    by_task = read_samples(samples) if isinstance(samples, str | Path) else samples
    by_task = by_task.get("samples", by_task) if isinstance(by_task, Mapping) else by_task
    if not isinstance(by_task, Mapping):
        raise ValueError(
            "samples: give the result of simple_evaluate(..., log_samples=True), a dict from tasks to their samples, "
            "or the path that --output_path named."
        )
    rows = []
    for task, of_task in by_task.items():
        for name, of_filter in _by_filter(of_task):
            if all(len(_log_likelihoods(sample)) > 1 for sample in of_filter):
                rows.append({"task": task, "filter": name, **_scores(of_filter, num_bins)})
            else:
                logger.info("Task %r has no choices, so it is left out.", task)
    if not rows:
        raise ValueError("No task has samples with choices: evaluate a multiple-choice task with log_samples=True.")
    return pd.DataFrame(rows)


def read_samples(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Read the files that ``lm_eval --log_samples --output_path`` wrote.

    Args:
        path: File ``samples_TASK_DATE.jsonl``, or a folder with such files at any depth. Of several files of one task,
            the newest counts.

    Returns:
        Samples by task.

    Raises:
        FileNotFoundError: There is no such file.

    Example:
        >>> read_samples("results")["arc_easy"][0]["target"]
    """
    check_path("path", path)
    found = sorted(Path(path).rglob("samples_*.jsonl")) if Path(path).is_dir() else [Path(path)]
    if not found:
        raise FileNotFoundError(f"{path} holds no file samples_*.jsonl: run lm_eval with --log_samples.")
    by_task: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(found, key=lambda file: file.stem.rpartition("_")[2]):
        task = file.stem.removeprefix("samples_").rpartition("_")[0]
        with file.open(encoding="utf-8") as lines:  # splitlines() would also divide at characters inside a text
            by_task[task] = [json.loads(line) for line in lines if line.strip()]
    return by_task


def _by_filter(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Divide the samples of a task by filter: the harness logs each row once per filter."""
    names = dict.fromkeys(sample.get("filter", "none") for sample in samples)
    for name in names:
        yield name, [sample for sample in samples if sample.get("filter", "none") == name]


def _scores(samples: Sequence[Mapping[str, Any]], num_bins: int) -> dict[str, float]:
    by_row = [_log_likelihoods(sample) for sample in samples]
    labels = np.asarray([_label(sample, values) for sample, values in zip(samples, by_row, strict=True)])
    log_probs = np.full((len(by_row), max(map(len, by_row))), -np.inf)  # a row may have fewer choices
    for row, values in enumerate(by_row):
        log_probs[row, : len(values)] = log_softmax(np.asarray(values))
    probs = np.exp(log_probs)
    return {
        "num_rows": len(by_row),
        "accuracy": accuracy(probs, labels),
        "nll": mean_nll(log_probs[np.arange(len(labels)), labels]),
        "brier": brier(probs, labels),
        "ece": ece(probs, labels, num_bins=num_bins),
    }


def _log_likelihoods(sample: Mapping[str, Any]) -> list[float]:
    """Return the log likelihood of each choice; empty if the answers are texts."""
    answers = sample["filtered_resps"]
    if not all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers):
        return []
    # With acc_mutual_info, the second half holds the choices without their question.
    count = len(answers) // 2 if "acc_mutual_info" in sample else len(answers)
    return [float(answer[0]) for answer in answers[:count]]  # numbers, or texts in a file


def _label(sample: Mapping[str, Any], values: Sequence[float]) -> int:
    """Return the index of the right choice. The target is an index or a text, and a file holds both as texts."""
    target, arguments = sample["target"], sample["arguments"]
    if isinstance(arguments, Mapping):
        arguments = [tuple(given.values()) for given in arguments.values()]
    text = str(target).strip()
    choices = [str(given[1]).strip() for given in arguments[: len(values)]]
    candidates = [int(text)] if text.isdigit() and int(text) < len(values) else []
    candidates += [choices.index(text)] if text in choices else []
    right = sample.get("acc")
    if right is not None:  # a number may be an index or a choice: the logged accuracy tells which
        candidates = [label for label in candidates if (int(np.argmax(values)) == label) == bool(right)]
    if not candidates:
        raise ValueError(
            f"The target {target!r} of row {sample.get('doc_id')} is not one of its choices {choices}, nor the index "
            "of one. Rows with several right answers have no calibration."
        )
    return candidates[0]
