"""Messages for steps that fail: which rows, which layers, which parameters."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..data.batch import Batch
from ..lora.adapter import Adapter
from .objective import TrainingObjective


@contextmanager
def explained(step: Callable[[], int]) -> Iterator[None]:
    """Add the step and advice to errors of torch that say little.

    Args:
        step: Gives the number of the running step. The death of a loader's worker can be raised anywhere in it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:  # fit never makes batches smaller by itself: that would be another training
        error.add_note(
            f"At step {step()}, and no row was left out. micro_batch_size= makes the same steps with fewer rows at a "
            "time, gradient_checkpointing=True with less memory per row (both in hardware=HardwareOptions(...))."
        )
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RuntimeError(
                f"At step {step()}: a worker process of the data loader died ({error}). Often it ran out of memory, or "
                "of shared memory (/dev/shm): lower num_workers, or set num_workers=0 to see its own error."
            ) from error
        if "does not require grad" in str(error):
            raise RuntimeError(f"At step {step()}: no trained parameter affects the loss. {CAUSES}") from error
        raise


class StepStatistics(NamedTuple):
    """What the host reads of a step: terms of the loss (nats per example), gradient norm, outcome of the update."""

    loss: float
    nll: float
    weighted_kl: float
    grad_norm: float
    outcome: float

    @property
    def had_finite_gradient(self) -> bool:
        """Whether loss and gradient are finite, so that the step made an update."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_finite(self) -> bool:
        """Whether the step changed the parameters: loss and gradient are finite, and the update was not taken back."""
        return self.had_finite_gradient and math.isfinite(self.outcome)


def describe_batch(batch: Batch, statistics: StepStatistics, kl: float, guide: nn.Module) -> str:
    """Describe a batch in one sentence: examples, terms of the loss, and the largest scale of the guide.

    Args:
        batch: The batch.
        statistics: What the host has read of its step.
        kl: KL, nats per data set.
        guide: The guide.
    """
    scale = largest_scale(guide)
    scales = "" if scale is None else f", largest scale of the guide {scale:.4g}"
    return (
        f"Examples {_some(batch.index.tolist())}: NLL {statistics.nll:.4g} nats per example, KL {kl:.4g} nats{scales}."
    )


def reason(step: int, statistics: StepStatistics, facts: str, cause: str | None, where: str = "") -> str:
    """Write the message of a step that is not finite.

    Args:
        step: Number of the step.
        statistics: What the host has read of it.
        facts: Description of its batch.
        cause: Why the loss is not finite; None if only the gradient is not finite.
        where: Which layers have a gradient that is not finite, as the end of a sentence.
    """
    kept = f"Parameters keep their values from before this step. {facts}"
    if cause is None:
        return (
            f"At step {step}: the loss is finite, but its gradient is not{where}. {kept} Lower the learning rates, or "
            "use bfloat16 instead of float16."
        )
    return (
        f"At step {step}: the loss is {statistics.loss}: {cause}. {kept} Lower the learning rates, set max_grad_norm, "
        "or check these examples."
    )


def too_large(step: int, names: Sequence[str], facts: str) -> str:
    """Write the message of an update that was taken back.

    Args:
        step: Number of the step.
        names: Parameters that were too large after it, if they are known.
        facts: Description of its batch.
    """
    more = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
    which = f"{names[0]}{more}" if names else "a parameter was"
    return (
        f"At step {step}: the update was too large: {which} not finite any more, or too large to be squared. It was "
        f"taken back: parameters keep their values from before this step. {facts} Lower the learning rates, or the "
        "weight decay."
    )


def names_of(objective: TrainingObjective, parameters: Sequence[Tensor]) -> list[str]:
    """Name trained parameters for a message."""
    wanted = {id(parameter) for parameter in parameters}
    named = [(name, p) for name, p in objective.named_parameters() if id(p) in wanted]
    return [short_name(name) for name, _ in named]


def short_name(name: str) -> str:
    """Name a parameter as users know it: ``<layer>/B``, or a scale of the guide."""
    if name.endswith("scale_unconstrained") and "guide." in name:
        return "a scale of the guide"
    if name.removeprefix("module.").startswith("guide."):
        return f"{name.rpartition('.')[2].removesuffix('_unconstrained')} of the guide"
    return name.split("point_estimates.")[-1].removesuffix("_unconstrained")


@torch.no_grad()
def where_not_finite(adapter: Adapter) -> str:
    """Name the adapted layers with a gradient that is not finite, as the end of a sentence; empty if there are none."""
    grads = [[p.grad for p in pair if p.grad is not None] for pair in adapter.factors()]
    rejected = [i for i, pair in enumerate(grads) if not all(bool(torch.isfinite(g).all()) for g in pair)]
    return f" in {name_layers(adapter, rejected)}" if rejected else ""


@torch.no_grad()
def overflown(objective: TrainingObjective) -> list[str]:
    """List the names of trained parameters that are not finite, after an update that was too large."""
    named = ((name, p) for name, p in objective.named_parameters() if p.requires_grad)
    names = [name.split("point_estimates.")[-1] for name, p in named if not torch.isfinite(p).all()]
    scale = largest_scale(objective.guide)  # a finite logarithm can have an infinite exponential
    if not names and scale is not None and not math.isfinite(scale):
        names.append("a scale of the guide")
    return names


@torch.no_grad()
def largest_scale(guide: nn.Module) -> float | None:
    """Find the largest parameter of a guide whose name contains "scale". NaN counts as largest.

    Returns:
        The value, or None if the guide has no scale.
    """
    scales = [
        value.detach().max()
        for path, module in guide.named_modules()
        if isinstance(module, PyroModule)
        for name, value in module.named_pyro_params(recurse=False)
        if "scale" in f"{path}.{name}" and value.numel()
    ]
    return float(torch.stack([s.double().cpu() for s in scales]).max()) if scales else None


def name_layers(adapter: Adapter, which: Sequence[int]) -> str:
    """Say how many of all adapted layers these are, and give the first five names."""
    names = [adapter.subspace.names[i] for i in which]
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{len(names)} of {len(adapter.subspace.names)} adapted layers: {shown}"


def _some(index: Sequence[int]) -> str:
    return str(list(index)) if len(index) <= 32 else f"{list(index[:32])} and {len(index) - 32} more"


CAUSES = (
    "Typical causes: gradient checkpointing on a frozen base (call llm.enable_input_require_grads(), or turn it off), "
    "an output that is detached, or an output that is computed under torch.no_grad()."
)
