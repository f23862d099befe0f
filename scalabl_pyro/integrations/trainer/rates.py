"""Options of a training by a Trainer: which of them come from TrainingArguments, and the learning rate of B."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...training.options import OptimizerOptions, TrainingOptions

logger = logging.getLogger(__name__)


def training_options(args: Any, rates: Mapping[str, Any], *, factor_scale: float | None, **own: Any) -> TrainingOptions:
    """Collect the options that :func:`scalabl_pyro.fit` has, and check them.

    Args:
        args: TrainingArguments.
        rates: Learning rates ``lr`` (see :func:`rate_of`), ``lr_A``, ``lr_loc`` and ``lr_scale``, by name.
        factor_scale: Standard deviation of a prior on the factors, or None.
        own: Further options of :class:`~scalabl_pyro.training.options.TrainingOptions`.

    Returns:
        The options. The schedule is left to the Trainer.

    Raises:
        ValueError: A value is out of its range.
        TypeError: A value has the wrong type.
    """
    limit = getattr(args, "max_grad_norm", None)
    optimizer = OptimizerOptions(
        lr_loc=rates["lr_loc"],
        lr_scale=rates["lr_scale"],
        weight_decay=args.weight_decay,
        factor_scale=factor_scale,
        max_grad_norm=limit or None,
    )
    batch_size = args.train_batch_size * args.gradient_accumulation_steps
    return TrainingOptions(
        lr=rate_of(args, rates["lr"]),
        lr_A=rates["lr_A"],
        batch_size=batch_size,
        seed=args.seed,
        optimizer=optimizer,
        **own,
    )


def rate_of(args: Any, lr: float | None) -> float:
    """Choose the learning rate of B: ``lr``, else ``args.learning_rate`` if the user set it, else that of ``fit``.

    The default of TrainingArguments is made for full fine-tuning, and would hardly move B.

    Raises:
        ValueError: Both are set, to different values.
    """
    default = next(f.default for f in fields(args) if f.name == "learning_rate")
    is_set = args.learning_rate != default
    if lr is None:
        lr = args.learning_rate if is_set else TrainingOptions().lr
        if not is_set:
            logger.info("the learning rate of B is %s, the default of scalabl_pyro.fit, and not %s", lr, default)
    elif is_set and args.learning_rate != lr:
        raise ValueError(f"lr={lr} and learning_rate={args.learning_rate} name two rates of B: set one of them.")
    return lr
