"""Checks around each update of a Trainer: gradients are finite and reach every layer, and no update is too large."""

from typing import Any

import torch
from transformers import TrainerCallback

from ...training.gradient_check import GradientCheck
from ...training.messages import names_of, where_not_finite
from ...training.optimizer import parameters_of
from ...training.start_check import check_start
from ...training.update_check import UpdateCheck, logarithms_of
from .elbo_module import ElboModule, all_finite


class StepChecks(TrainerCallback):
    """Raises an error at a step that is not finite, before or after its update. A Trainer would go on.

    Args:
        module: What is trained.
    """

    def __init__(self, module: ElboModule) -> None:
        self.module = module
        self.reach = GradientCheck(module.blora)
        self.updates: UpdateCheck | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that updates can be made from where the parameters are."""
        optimizer = kwargs["optimizer"]
        self.updates = UpdateCheck(parameters_of(optimizer), logarithms=logarithms_of(self.module))
        check_start(self.module.objective, self.updates)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradient, and keep the parameters."""
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not all_finite(grads):
            where = where_not_finite(self.module.blora.adapter)
            raise FloatingPointError(
                f"At step {state.global_step}: the loss is finite, but its gradient is not{where}. Parameters keep "
                "their values from before this step. Lower the learning rates, or set max_grad_norm."
            )
        self.reach(torch.zeros(()))
        assert self.updates is not None
        self.updates.keep()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the parameters after an update."""
        assert self.updates is not None
        if self.updates.settle():
            names = names_of(self.module.objective, self.updates.rejected) or ["a parameter"]
            raise FloatingPointError(
                f"At step {state.global_step}: the update was too large: {names[0]} was not finite any more, or too "
                "large to be squared. It was taken back. Lower the learning rates, or the weight decay."
            )
