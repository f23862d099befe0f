"""What a posterior stores about its training: options, rates, data and versions, all of it plain JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from .._process.versions import versions
from ..data.batch import Batch
from ..data.training_batches import TrainingBatches
from .options import TrainingOptions
from .run_identity import SCHEDULE_PROBES, option_value, plain

__all__ = ["as_json", "describe_capture", "describe_data", "describe_options", "versions"]


def describe_options(options: TrainingOptions, history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Describe all options of a training.

    Args:
        options: The options.
        history: Rows of the steps that were taken. A ``kl_weight`` that is a function is described by the weights of
            up to 9 of them, so that it is not called again.

    Returns:
        Values by name, with one dict per group.
    """
    groups = ("optimizer", "checkpoint", "hardware", "evaluation")
    own = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in groups}
    if callable(options.kl_weight):
        last = max(len(history) - 1, 0)
        probes = sorted({round(i * last / (SCHEDULE_PROBES - 1)) for i in range(SCHEDULE_PROBES)}) if history else []
        own["kl_weight"] = {str(history[i]["step"]): history[i]["kl_weight"] for i in probes}
    own["elbo"] = option_value(options.elbo, options.num_steps)
    return own | {name: asdict(getattr(options, name)) for name in groups}


def describe_data(batches: Callable[[int], Batch], num_data: int) -> dict[str, Any]:
    """Describe the training data.

    Args:
        batches: Gives the batch of a step.
        num_data: Number of rows.

    Returns:
        ``num_rows``, and ``sha256`` of all tokens and answers, in their order. It is None for a loader of batches,
        whose rows are not known.
    """
    return {"num_rows": num_data, "sha256": batches.digest if isinstance(batches, TrainingBatches) else None}


def describe_capture(why_eager: str | None) -> dict[str, Any]:
    """Describe whether steps were captured as CUDA graphs.

    Args:
        why_eager: Why they were not; None if they were.

    Returns:
        ``used``, and ``reason``, which is None where graphs were used.
    """
    return {"used": why_eager is None, "reason": why_eager}


def as_json(value: Any) -> Any:
    """Convert a record to what it will be after it was saved and loaded."""
    return json.loads(json.dumps(plain(value)))
