"""Words for what goes wrong in a step: which rows, which layers, which parameters."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from pyro.nn import PyroModule
from torch import nn

from ..data.batch import Batch
from ..lora.adapter import Adapter
from .objective import Objective
from .svgd import SteinObjective


@contextmanager
def explained(step: Callable[[], int]) -> Iterator[None]:
    """Put errors of torch that say little in other words; a worker's death is raised wherever the host is just then."""
    try:
        yield
    except torch.OutOfMemoryError as error:  # a smaller batch would be another training: that is the caller's to say
        error.add_note(
            f"At step {step()}, and no row was left out. micro_batch_size= makes the same steps with fewer rows at a "
            "time, gradient_checkpointing=True with less memory a row."
        )
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RuntimeError(
                f"At step {step()}: a worker process of the data loader died ({error}). Often it ran out of memory, or "
                "of shared memory (/dev/shm): lower num_workers, or set num_workers=0 to see its own error."
            ) from error
        if "does not require grad" in str(error):
            raise RuntimeError(f"At step {step()}: the loss depends on nothing that is trained. {CAUSES}") from error
        raise


class StepStatistics(NamedTuple):
    """What the device said of a step: nats per example, and the gradient norm."""

    loss: float
    nll: float
    weighted_kl: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def describe(batch: Batch, figures: StepStatistics, kl: float, guide: nn.Module) -> str:
    """Examples, terms of the loss, and the largest scale of the guide, in one sentence."""
    scale = largest_scale(guide)
    scales = "" if scale is None else f", largest scale of the guide {scale:.4g}"
    return f"Examples {_some(batch.index.tolist())}: NLL {figures.nll:.4g} nats per example, KL {kl:.4g} nats{scales}."


def reason(step: int, figures: StepStatistics, facts: str, cause: str | None, where: str = "") -> str:
    """The whole message of a step that is not finite.

    ``cause`` is why the loss is not; None if it is, and ``where`` then says whose gradient is not.
    """
    kept = f"Parameters keep their values from before this step. {facts}"
    if cause is None:
        return (
            f"At step {step}: the loss is finite, but its gradient is not{where}. {kept} Lower the learning rates, or "
            "use bfloat16 instead of float16."
        )
    return (
        f"At step {step}: the loss is {figures.loss}: {cause}. {kept} Lower the learning rates, set max_grad_norm, or "
        "check these examples."
    )


@torch.no_grad()
def where_not_finite(adapter: Adapter) -> str:
    """Adapted layers with a gradient that is not finite, to be added to a sentence; empty if there are none."""
    grads = [[p.grad for p in pair if p.grad is not None] for pair in adapter.factors()]
    bad = [i for i, pair in enumerate(grads) if not all(bool(torch.isfinite(g).all()) for g in pair)]
    return f" in {name_layers(adapter, bad)}" if bad else ""


@torch.no_grad()
def overflown(objective: Objective | SteinObjective) -> list[str]:
    """Names of trained parameters that are not finite, after an update that was too large."""
    named = ((name, p) for name, p in objective.named_parameters() if p.requires_grad)
    names = [name.split("point_estimates.")[-1] for name, p in named if not torch.isfinite(p).all()]
    scale = largest_scale(objective.guide)  # finite as a logarithm, it may not be as a number
    if not names and scale is not None and not math.isfinite(scale):
        names.append("a scale of the guide")
    return names


@torch.no_grad()
def largest_scale(guide: nn.Module) -> float | None:
    """The largest parameter of a guide that is named a scale; NaN wins; None if there is none."""
    scales = [
        value.detach().max()
        for path, module in guide.named_modules()
        if isinstance(module, PyroModule)
        for name, value in module.named_pyro_params(recurse=False)
        if "scale" in f"{path}.{name}" and value.numel()
    ]
    return float(torch.stack([s.double().cpu() for s in scales]).max()) if scales else None


def name_layers(adapter: Adapter, which: Sequence[int]) -> str:
    """How many layers of all, and the first of their names."""
    names = [adapter.subspace.names[i] for i in which]
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{len(names)} of {len(adapter.subspace.names)} adapted layers: {shown}"


def _some(index: Sequence[int]) -> str:
    return str(list(index)) if len(index) <= 32 else f"{list(index[:32])} and {len(index) - 32} more"


CAUSES = (
    "Typical causes: gradient checkpointing on a frozen base (call llm.enable_input_require_grads(), or turn it off), "
    "an output that is detached, or computed under torch.no_grad()."
)
