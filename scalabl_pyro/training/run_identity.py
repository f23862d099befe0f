"""Describes what makes a run the same run, and compares two descriptions, for checkpoints and between processes."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO

from .. import guides, priors, tasks
from ..data.batch import Batch
from ..data.training_batches import TrainingBatches
from ..distributed.processes import Processes
from ..guides import Guide
from ..lora.adapter import Adapter
from ..lora.fingerprint import check_fingerprint, describe_layers, fingerprint
from ..lora.float8 import precision_of
from ..model.joint import TaskModel
from .loop import Trainer

#: Entries that are digests.
DATA, EVAL_DATA = "train_data", "eval_data"
FIXED = "what is held fixed (frozen parameters, numbers of the prior)"
#: Number of steps at which KL schedules are compared.
SCHEDULE_PROBES = 9


def describe_run(
    model: TaskModel, guide: Guide, batches: Callable[[int], Batch], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a run for JSON: options, program, data, base model, and all numbers that are held fixed.

    Args:
        model: The joint model.
        guide: The guide.
        batches: Gives the batch of a step.
        options: Options, see :meth:`scalabl_pyro.training.options.TrainingOptions.identity`. Functions of the step are
            compared by their values, ELBOs by class and number of draws.
    """
    adapter = model.blora.adapter
    prior = {f"prior.{n}": t for n, t in model.blora.prior.named_buffers()}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    run = {
        **{name: option_value(value, options["num_steps"]) for name, value in options.items()},
        "num_data": model.num_data,
        "draws": model.draws,
        DATA: _data_digest(batches),
        "task": tasks.to_config(model.task),
        "guide": guides.to_config(guide),
        "prior": priors.to_config(model.blora.prior),
        "layers": describe_layers(adapter),
        "gauge": adapter.gauge,
        **_precision(adapter),
        "lora_dropout": _dropout(adapter),
        FIXED: _digest({**prior, **frozen}),
        "base_model": fingerprint(adapter),
    }
    return json.loads(json.dumps(plain(run)))


def begin_alike(processes: Processes, trainer: Trainer, run: Mapping[str, Any]) -> None:
    """Start several processes with the parameters of the first one.

    Args:
        processes: Processes that train together.
        trainer: The trainer, before its first step.
        run: Description of the run in this process.

    Raises:
        ValueError: The run of another process differs.
    """
    for rank, other in enumerate(processes.all_gather(lambda: run)):
        differing = differences(other, run)
        try:
            check_fingerprint(other["base_model"], run["base_model"])
        except ValueError as error:
            differing.append(str(error))
        if differing:
            raise ValueError(
                f"Process {processes.rank} was asked for another training than process {rank}: {'; '.join(differing)}. "
                "All must call fit with the same options, data and base model."
            )
    processes.broadcast([tensor.data for tensor in trainer.learned.tensors().values()])


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """List the entries in which two runs differ. Base models are compared by :func:`check_fingerprint` instead.

    Args:
        saved: Description of the saved run.
        present: Description of the present run.

    Returns:
        One phrase per entry.
    """
    found = []
    for name in sorted((set(saved) | set(present)) - {"base_model"}):
        was, now = saved.get(name), present.get(name)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += [f"{name}: {inner}" for inner in differences(was, now)]
        elif name in (DATA, EVAL_DATA, FIXED) or len(f"{was}{now}") > 200:
            found.append(f"{name} differs")
        else:
            found.append(f"{name} is {now!r}, was {was!r}")
    return found


def check_same_run(record: Mapping[str, Any], run: Mapping[str, Any], *, path: Path, advice: str) -> None:
    """Check that a checkpoint belongs to a run.

    Args:
        record: Record of the checkpoint.
        run: Identity of the present run.
        path: Path of the checkpoint, for the message.
        advice: What to do if it belongs to another run.

    Raises:
        ValueError: It belongs to another run, or does not say which one.
    """
    message = f"{path} belongs to another run"
    saved = record.get("run")
    if not isinstance(saved, dict) or not isinstance(saved.get("base_model"), dict):
        raise ValueError(f"{message}: its record does not say which run wrote it.")
    if differing := differences(saved, run):
        raise ValueError(f"{message}: {'; '.join(differing)}. {advice}")
    try:
        check_fingerprint(saved["base_model"], run["base_model"])
    except ValueError as error:
        raise ValueError(f"{message}. {error}") from None


def option_value(value: Any, num_steps: int) -> Any:
    """Describe an option: an ELBO by class and number of draws, a function of the step by its values."""
    if isinstance(value, ELBO):
        own = {k: getattr(value, k) for k in ("num_particles", "vectorize_particles", "alpha") if hasattr(value, k)}
        return {"class": type(value).__name__, **own}
    if callable(value):
        return [float(value(round(i * (num_steps - 1) / (SCHEDULE_PROBES - 1)))) for i in range(SCHEDULE_PROBES)]
    return value


def plain(value: Any) -> Any:
    """Convert a value for JSON. Other objects become the name of their class."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _precision(adapter: Adapter) -> dict[str, str]:
    """Return the precision of the frozen weights; nothing for the usual one, so that older checkpoints stay valid."""
    precision = precision_of(adapter.module)
    return {} if precision == "original" else {"base_precision": precision}


def _dropout(adapter: Adapter) -> float | list[float]:
    """Dropout probability on the input of A: one number, or one per layer if they differ."""
    modules = [layer.lora_dropout[adapter.adapter_name] for layer in adapter.layers]
    chances = [float(getattr(module, "p", 0.0)) for module in modules]
    return chances[0] if len(set(chances)) == 1 else chances


def _data_digest(batches: Callable[[int], Batch]) -> str:
    """Digest of all tokens and targets. The batches of a loader are compared when a resumption replays them."""
    return batches.digest if isinstance(batches, TrainingBatches) else type(batches).__name__


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
