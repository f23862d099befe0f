"""Options of a training: checked when they are made, immutable, and the identity of a run."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pyro.infer import ELBO

from .._arguments import known_arguments_of_methods
from .._errors import check_choice, check_count, check_positive, check_scale
from .._process.random_state import as_seed
from ..guides import INIT_SCALE
from .objective import weight_at
from .option_groups import (
    GROUPS,
    CheckpointOptions,
    EvaluationOptions,
    HardwareOptions,
    OptimizerOptions,
    make_plain,
)

DrawsPerBatch = Literal["per_example", "shared"]
OnNonfinite = Literal["raise", "skip", "restore"]

#: Number of evaluations in a run whose caller does not say how often.
NUM_EVALUATIONS = 10

#: Fields of TrainingOptions that may differ between a run and its resumption. ``draws`` is described by the model,
#: which knows what the guide allows. Options of evaluations belong to the held-out rows, if there are any.
NOT_IN_IDENTITY = frozenset(
    {"optimizer", "checkpoint", "hardware", "on_nonfinite", "draws", "eval_every", "patience", "evaluation"}
)


@known_arguments_of_methods
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """All options of one call of :func:`scalabl_pyro.fit` that are numbers or words. They identify the run.

    :meth:`identity` gives the options that make another run: a checkpoint can be resumed only with equal ones.

    Args:
        num_steps: Number of optimizer steps.
        batch_size: Rows per step.
        lr: Learning rate of B and of the task's parameters.
        lr_A: Learning rate of A and of new heads.
        kl_weight: Weight of the KL, or a function from the step to the weight.
        elbo: ELBO estimator of Pyro, or None for the default one.
        draws: Whether each row gets its own draw, or all rows share one.
        init_scale: Largest initial standard deviation of the guide.
        seed: Seed of the data order, the initial scales and the noise.
        on_nonfinite: What to do after a step that is not finite.
        eval_every: Number of steps between two evaluations; None for ten evaluations in the run.
        patience: Number of evaluations in a row without a lower held-out NLL after which the run ends; None for no end.
        optimizer: Options of the optimizer.
        checkpoint: Options of checkpoints.
        hardware: Options that trade memory for time.
        evaluation: Options of evaluations on held-out rows.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value has the wrong type.
    """

    num_steps: int = 1000
    batch_size: int = 16
    lr: float = 8e-3
    lr_A: float = 2.5e-4
    kl_weight: float | Callable[[int], float] = 1.0
    elbo: ELBO | None = None
    draws: DrawsPerBatch = "per_example"
    init_scale: float = INIT_SCALE
    seed: int = 0
    on_nonfinite: OnNonfinite = "raise"
    eval_every: int | None = None
    patience: int | None = None
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    hardware: HardwareOptions = field(default_factory=HardwareOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def __post_init__(self) -> None:
        make_plain(self)
        check_count(num_steps=self.num_steps, batch_size=self.batch_size)
        check_positive(lr=self.lr, lr_A=self.lr_A)
        check_scale(init_scale=self.init_scale)
        check_choice("draws", self.draws, ("per_example", "shared"))
        check_choice("on_nonfinite", self.on_nonfinite, ("raise", "skip", "restore"))
        if self.elbo is not None and not isinstance(self.elbo, ELBO):
            raise TypeError(f"elbo={self.elbo!r}: expected an instance such as pyro.infer.Trace_ELBO().")
        as_seed(self.seed)
        given = {"eval_every": self.eval_every, "patience": self.patience}
        check_count(**{name: value for name, value in given.items() if value is not None})
        for name, kind in GROUPS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected scalabl_pyro.{kind.__name__}(...).")
        if max(self.lr, self.lr_A) * (decay := self.optimizer.weight_decay) > 1:
            raise ValueError(f"weight_decay={decay!r} must be at most 1 / lr, or a step would do more than erase B.")
        if not callable(self.kl_weight):
            weight_at(self.kl_weight, 0)

    @property
    def lr_loc(self) -> float:
        """Learning rate of the guide's locations."""
        return self.lr if self.optimizer.lr_loc is None else self.optimizer.lr_loc

    @property
    def steps_between_evaluations(self) -> int:
        """Number of steps from one evaluation to the next."""
        return self.eval_every or max(self.num_steps // NUM_EVALUATIONS, 1)

    def identity(self) -> dict[str, Any]:
        """Options that make another run, by name. The groups are flat, as in checkpoints."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_IN_IDENTITY}
        return own | {f.name: getattr(self.optimizer, f.name) for f in fields(self.optimizer)}
