"""What a Trainer logs and records of an ELBO: its terms per step, the identity of a run, and the provenance."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...data.batch import Batch
from ...data.training_batches import TrainingBatches
from ...training.options import TrainingOptions
from ...training.provenance import as_json, describe_data, describe_options, versions
from ...training.run_identity import describe_run
from .elbo_module import ElboModule
from .inputs import EncodedRows

#: Number of steps over which a schedule of the KL weight is compared. A Trainer may be asked for more steps later.
SCHEDULE_STEPS = 1000
#: Options of ``fit`` that a Trainer sets by its own scheduler.
OF_TRAINER = ("num_steps", "warmup", "schedule", "max_grad_norm")


class LossTerms:
    """NLL and KL since the last time that they were logged, averaged over optimizer steps."""

    def __init__(self) -> None:
        self.steps = 0
        self._nll: Tensor | float = 0.0
        self._kl: Tensor | float = 0.0

    def begin_step(self) -> None:
        """Count an optimizer step."""
        self.steps += 1

    def add(self, nll: Tensor, kl: Tensor) -> None:
        """Add what one batch contributes to the NLL (nats per row) and to the KL (nats per data set) of its step."""
        self._nll, self._kl = self._nll + nll, self._kl + kl

    def take(self) -> dict[str, float]:
        """Return the averages, and begin anew; empty if there were no steps."""
        steps = self.steps
        values = {"nll": float(self._nll) / steps, "kl": float(self._kl) / steps} if steps else {}
        self.steps, self._nll, self._kl = 0, 0.0, 0.0
        return {name: value for name, value in values.items() if value == value}


def run_of(module: ElboModule, options: TrainingOptions, data: Any) -> dict[str, Any]:
    """Describe a run for its checkpoints; see :func:`~scalabl_pyro.training.run_identity.describe_run`."""
    own = {name: value for name, value in options.identity().items() if name not in OF_TRAINER}
    model = module.objective.model
    return describe_run(model, module.guide, _batches_of(data, module), own | {"num_steps": SCHEDULE_STEPS})


def describe_training(
    module: ElboModule, options: TrainingOptions, *, data: Any, num_steps: int, seconds: float, start: str, trainer: str
) -> dict[str, Any]:
    """Describe a training for the posterior that it gave, with the keys that :func:`scalabl_pyro.fit` has."""
    model = module.objective.model
    record = {
        "num_data": model.num_data,
        "num_steps": num_steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "draws": model.draws,
        "method": module.guide.method,
        "elbo": type(module.elbo).__name__,
        "seconds": round(seconds, 3),
        "start": start,
        "trainer": trainer,
        "options": _own_options(describe_options(options, [])),
        "rates": {
            **{"A": options.lr_A, "B": options.lr, "heads": options.lr_A, "task": options.lr},
            **{"loc": options.lr_loc, "scale": options.optimizer.lr_scale},
        },
        "data": describe_data(_batches_of(data, module), model.num_data),
        "versions": versions(),
    }
    return as_json(record)


def _own_options(described: dict[str, Any]) -> dict[str, Any]:
    """Leave out the options of ``fit`` that a Trainer has not, or has of its own."""
    optimizer = {name: value for name, value in described["optimizer"].items() if name not in OF_TRAINER}
    left_out = (*OF_TRAINER, "on_nonfinite", "checkpoint", "hardware")
    return {name: value for name, value in described.items() if name not in left_out} | {"optimizer": optimizer}


def _batches_of(data: Any, module: ElboModule) -> Callable[[int], Batch]:
    """Batches of the rows, for their digest. Nothing reads a batch."""
    if isinstance(data, EncodedRows):
        return TrainingBatches(data.examples, 1, module.objective.model.task.pad_token_id, seed=0)
    return _unknown


def _unknown(step: int) -> Batch:
    raise NotImplementedError("the data set belongs to the Trainer")
