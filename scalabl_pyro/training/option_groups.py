"""Groups of options that few calls of ``fit`` set: for the optimizer, checkpoints, memory, and evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from .._arguments import known_arguments_of_methods, suggest
from .._errors import (
    check_auto_flag,
    check_choice,
    check_count,
    check_flag,
    check_not_negative,
    check_positive,
    check_scale,
    check_share,
    describe,
    is_number,
)
from .._values import plain

Schedule = Literal["linear", "constant"]
Group = TypeVar("Group")


@known_arguments_of_methods
@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Options of AdamW beside the learning rates ``lr`` and ``lr_A``.

    Args:
        lr_loc: Learning rate of the guide's locations. Default: ``lr``.
        lr_scale: Learning rate of the guide's scales, which are learned as logarithms.
        weight_decay: Decay of B, and of A if the gauge leaves A free. It is decoupled from the loss: each step shrinks
            them by learning rate times decay, which must be 1 at most.
        factor_scale: Standard deviation of a normal MAP prior on B, and on A if the gauge leaves A free. It is a term
            of the loss.
        warmup: Share of the steps in which the learning rates rise from 0.
        schedule: Learning rates after the warm-up: ``"linear"`` decay to 0, or ``"constant"``.
        max_grad_norm: Largest global gradient norm. Larger gradients are scaled down to it. Default: no limit.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> options = scalabl_pyro.OptimizerOptions(lr_scale=1e-2, schedule="constant")
        >>> options.warmup
        0.06
    """

    lr_loc: float | None = None
    lr_scale: float = 3e-2
    weight_decay: float = 0.0
    factor_scale: float | None = None
    warmup: float = 0.06
    schedule: Schedule = "linear"
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if self.factor_scale is not None:
            check_scale(factor_scale=self.factor_scale)
        check_positive(lr_scale=self.lr_scale, **({} if self.lr_loc is None else {"lr_loc": self.lr_loc}))
        check_not_negative(weight_decay=self.weight_decay)
        check_choice("schedule", self.schedule, ("linear", "constant"))
        check_share(warmup=self.warmup)
        limit = self.max_grad_norm
        if limit is not None and (not is_number(limit) or not limit > 0):
            raise ValueError(f"max_grad_norm={limit!r} must be positive. Leave it out for no limit.")


@known_arguments_of_methods
@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """When checkpoints are written to ``checkpoint_dir``, and what a call does with those it finds there.

    Args:
        every: Number of steps between two checkpoints.
        keep: Number of most recent checkpoints to keep.
        resume: ``"auto"`` resumes from the newest valid checkpoint if there is one. True requires a checkpoint. False
            requires that the directory holds none.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> scalabl_pyro.CheckpointOptions(every=50).keep
        2
    """

    every: int = 100
    keep: int = 2
    resume: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        make_plain(self)
        check_count(every=self.every, keep=self.keep)
        check_auto_flag(resume=self.resume)


@known_arguments_of_methods
@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """Options that trade memory for time. They change the result by rounding at most.

    Args:
        micro_batch_size: Rows per forward pass of each process. Gradients of the same ELBO are accumulated. Default:
            the whole batch.
        cache_prefix: Whether to compute the blocks below the first adapted block once per row, and to keep their
            output on the device (tokens x width numbers per row) for all later epochs.
        cuda_graph: Whether to capture the whole step as a CUDA graph, once per batch shape, and to replay it: one
            launch per step instead of thousands, with the same losses. Lengths are rounded up, so that shapes repeat:
            to multiples of 4 tokens, and of 8, 16, ... from 32, 64, ... tokens on. ``"auto"`` captures where the step
            allows it, and logs why if it does not. True raises an error instead. Several processes capture the gradient
            and the update, and add up their gradients between them. ``posterior.provenance["cuda_graph"]`` says whether
            steps were captured.
        gradient_checkpointing: Whether to keep only the input of each block and to run the block again in the backward
            pass, with the same draws. It takes about a third more time and far less memory.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A switch is not a bool.

    Example:
        >>> scalabl_pyro.HardwareOptions(micro_batch_size=4).cuda_graph
        'auto'
    """

    micro_batch_size: int | None = None
    cache_prefix: bool = False
    cuda_graph: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        make_plain(self)
        if self.micro_batch_size is not None:
            check_count(micro_batch_size=self.micro_batch_size)
        check_auto_flag(cuda_graph=self.cuda_graph)
        check_flag(cache_prefix=self.cache_prefix, gradient_checkpointing=self.gradient_checkpointing)


@known_arguments_of_methods
@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How ``eval_data`` is scored while a training runs.

    Args:
        num_draws: Number of posterior draws. Each evaluation uses the same random numbers, so that a change of the
            scores is a change of the posterior. 0 scores the posterior mean.
        batch_size: Rows of ``eval_data`` per forward pass. All draws of a row share one pass if memory allows it.

    Raises:
        ValueError: A value is out of its range.

    Example:
        >>> scalabl_pyro.EvaluationOptions(num_draws=20).batch_size
        16
    """

    num_draws: int = 8
    batch_size: int = 16

    def __post_init__(self) -> None:
        make_plain(self)
        check_count(num_draws=self.num_draws, least=0)
        check_count(batch_size=self.batch_size)


#: Option groups of ``fit``.
GROUPS: dict[str, type] = {
    "optimizer": OptimizerOptions,
    "checkpoint": CheckpointOptions,
    "hardware": HardwareOptions,
    "evaluation": EvaluationOptions,
}

#: Flat spellings of release 0.1, and the option group that each belongs to now.
MOVED_TO_GROUPS = {
    **{f.name: f"optimizer.{f.name}" for f in fields(OptimizerOptions)},
    **{f.name: f"hardware.{f.name}" for f in fields(HardwareOptions)},
    **{"checkpoint_every": "checkpoint.every", "keep_checkpoints": "checkpoint.keep", "resume": "checkpoint.resume"},
    **{"loc_lr": "optimizer.lr_loc", "scale_lr": "optimizer.lr_scale"},
}


def as_group(name: str, kind: type[Group], given: Group | Mapping[str, Any] | None) -> Group:
    """Read an option group of ``fit``.

    Args:
        name: Name of the argument.
        kind: Class of the group.
        given: An instance, a dict of its fields, or None for the defaults.

    Returns:
        The group.

    Raises:
        TypeError: ``given`` is something else, or it has a key that the group lacks.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name}={given!r}: expected scalabl_pyro.{kind.__name__}(...), or a dict of its options."
            if isinstance(given, int | float | str | list)
            else f"{name} is {describe(given)}, expected scalabl_pyro.{kind.__name__}(...), or a dict of its options."
        )
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise TypeError(f"{name}={given!r}: {kind.__name__} has no option {key!r}. {suggest(str(key), known)}")
    return kind(**given)


def as_groups(**given: Any) -> dict[str, Any]:
    """Read all option groups of ``fit``, by name; see :func:`as_group`."""
    return {name: as_group(name, GROUPS[name], value) for name, value in given.items()}


def optimizer_with(given: OptimizerOptions | Mapping[str, Any] | None, **own: Any) -> OptimizerOptions:
    """Options of the optimizer with other defaults, for a method that has its own.

    Args:
        given: What the caller gave as ``optimizer=``. A field of an instance counts as given if it differs from the
            default of the class; a dict says it exactly.
        own: Values of the fields that the caller did not give.

    Returns:
        The options.

    Raises:
        TypeError: ``given`` is neither options nor a dict of them, or it has a key that the group lacks.
    """
    options = as_group("optimizer", OptimizerOptions, given)
    if isinstance(given, Mapping):
        unset = own.keys() - given.keys()
    else:
        default = OptimizerOptions()
        unset = {name for name in own if getattr(options, name) == getattr(default, name)}
    return replace(options, **{name: own[name] for name in unset})


def make_plain(options: Any) -> None:
    """Turn NumPy and torch scalars into Python values, which checkpoints can hold."""
    for option in fields(options):
        object.__setattr__(options, option.name, plain(getattr(options, option.name)))
