"""What can go wrong in a step, what is done about it, and how it is put in words."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._errors import check_choice
from ..data.batch import Batch
from ..lora.adapter import Adapter
from ..model.bayesian_lora import BayesianLoRA
from ..priors.sites import prior_sites
from .objective import Objective
from .svgd import SteinObjective
from .training_state import LearnedState

logger = logging.getLogger(__name__)

POLICIES = ("raise", "skip", "restore")
#: So many steps left out in a row are no accident.
MAX_IN_A_ROW = 10
#: Steps between the copies that ``"restore"`` goes back to; failing again sooner than that ends the training.
SNAPSHOT_EVERY = 50
#: Steps after which a layer whose gradient was always 0 is taken to be cut off.
MAX_ZERO_STEPS = 10


class Recovery:
    """What follows a step that is not finite. No parameter was changed by it.

    Args:
        policy: ``"raise"``; ``"skip"`` leaves the step out; ``"restore"`` also goes back to parameters and optimiser
            state of up to ``SNAPSHOT_EVERY`` steps ago, and on with later batches and other noise, as Chowdhery et al.
            (PaLM, 2022, section 5.1) did by hand.
        learned: what is copied and restored.

    Attributes:
        skipped: number of steps left out.
    """

    def __init__(self, policy: str, learned: LearnedState) -> None:
        check_choice("on_nonfinite", policy, POLICIES)
        self.policy = policy
        self.learned = learned
        self.skipped = 0
        self._in_a_row = 0
        self._restored_at: int | None = None
        self._snapshot: dict[str, Tensor] | None = None
        self._snapshot_step = 0

    def good(self) -> None:
        """Told of each step that was finite."""
        self._in_a_row = 0

    def remember(self, step: int, *, now: bool = False) -> None:
        """Copy the state from before ``step``, if one is wanted and due (or ``now``)."""
        if self.policy != "restore":
            return
        is_due = now or self._snapshot is None or step - self._snapshot_step >= SNAPSHOT_EVERY
        if is_due and not overflown(self.learned.objective):  # what it goes back to must be better than what it leaves
            self._snapshot, self._snapshot_step = self.learned.snapshot(), step

    def bad(self, step: int, figures: str) -> str | None:
        """Deal with a step that was not finite; a reason to stop, or None to go on with the next step."""
        if self.policy == "raise":
            return ""
        self._in_a_row += 1
        if self.policy == "skip" and self._in_a_row >= MAX_IN_A_ROW:
            return f" {self._in_a_row} steps in a row were not finite."
        if self.policy == "restore":
            if self._restored_at is not None and step - self._restored_at < SNAPSHOT_EVERY:
                return f" It is the second time within {SNAPSHOT_EVERY} steps: going back does not help."
            if self._snapshot is None:
                return " No parameters from before it are finite."
            self.learned.load(self._snapshot)
            self._restored_at = step
        self.skipped += 1
        back = f", and the parameters of step {self._snapshot_step} are back" if self.policy == "restore" else ""
        logger.warning("step %d was not finite and is left out%s. %s", step, back, figures)
        return None

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "restored_at": self._restored_at}

    def load_record(self, record: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.skipped, self._in_a_row = record["skipped"], record["in_a_row"]
        self._restored_at = record["restored_at"]


class GradientCheck:
    """Whether the gradient reaches every adapted layer: asked of the first backward pass, and then no more.

    A layer that was called, but whose output got no gradient, is cut off. One whose gradient is 0 is asked again for a
    few steps, as masks or saturation can do that. One that was not called (an expert without rows) is let pass.

    Args:
        blora: the LLM.
    """

    def __init__(self, blora: BayesianLoRA) -> None:
        self.blora = blora
        self.adapter: Adapter = blora.adapter
        self.steps = 0
        self.called: set[int] = set()
        self.reached: set[int] = set()
        self.waiting = {i for i, pair in enumerate(self.adapter.factors()) if any(p.requires_grad for p in pair)}
        self._hooks: list[RemovableHandle] = [
            cast(nn.Module, layer).register_forward_hook(partial(self._watch, i))
            for i, layer in enumerate(self.adapter.layers)
        ]

    def __call__(self, loss: Tensor) -> None:
        """Look at ``.grad``, if the loss is finite.

        Raises:
            RuntimeError: layers that no gradient reaches, by name.
        """
        if not self._hooks or _is_captured() or not torch.isfinite(loss):
            return
        self.steps += 1
        factors = self.adapter.factors()
        self.waiting = {i for i in self.waiting if not any(_is_moved(p) for p in factors[i])}
        asked = self.waiting & self.called
        cut = asked - self.reached
        if not cut and asked and self.steps >= MAX_ZERO_STEPS and not self._masks():
            cut = asked
        if cut:
            self.close()
            raise RuntimeError(
                f"No gradient reaches {_layers(self.adapter, sorted(cut))}. They would never learn. {CAUSES}"
            )
        if not asked or self.steps >= MAX_ZERO_STEPS:
            self.close()

    def close(self) -> None:
        """Take the hooks away; it is asked no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self.called.add(index)
        if not torch.is_tensor(output):
            self.reached.add(index)
        elif output.requires_grad:
            output.register_hook(lambda grad: self.reached.add(index))

    def _masks(self) -> bool:
        """Whether latents can be exactly 0."""
        return any(site["fn"].support.is_discrete for site in prior_sites(self.blora.prior).values())


CAUSES = (
    "Typical causes: gradient checkpointing on a frozen base (call llm.enable_input_require_grads(), or turn it off), "
    "an output that is detached, or computed under torch.no_grad()."
)


def _is_captured() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_moved(parameter: Tensor) -> bool:
    grad = parameter.grad
    return parameter.requires_grad and grad is not None and bool((grad != 0).any())  # NaN is dealt with elsewhere


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


class Figures(NamedTuple):
    """What the device said of a step: nats per example, and the gradient norm."""

    loss: float
    nll: float
    weighted_kl: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def describe(batch: Batch, figures: Figures, kl: float, guide: nn.Module) -> str:
    """Examples, terms of the loss, and the largest scale of the guide, in one sentence."""
    scale = largest_scale(guide)
    scales = "" if scale is None else f", largest scale of the guide {scale:.4g}"
    return f"Examples {_some(batch.index.tolist())}: NLL {figures.nll:.4g} nats per example, KL {kl:.4g} nats{scales}."


def reason(step: int, figures: Figures, facts: str, cause: str | None, where: str = "") -> str:
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
    return f" in {_layers(adapter, bad)}" if bad else ""


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


def _layers(adapter: Adapter, which: Sequence[int]) -> str:
    """How many layers of all, and the first of their names."""
    names = [adapter.subspace.names[i] for i in which]
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{len(names)} of {len(adapter.subspace.names)} adapted layers: {shown}"


def _some(index: Sequence[int]) -> str:
    return str(list(index)) if len(index) <= 32 else f"{list(index[:32])} and {len(index) - 32} more"
