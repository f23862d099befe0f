"""Checks in the first steps that the gradient reaches every adapted layer."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._process.cuda_capture import is_capturing
from ..lora.adapter import Adapter
from ..model.bayesian_lora import BayesianLoRA
from ..priors.sites import prior_sites
from .messages import CAUSES, name_layers

#: Number of steps after which a layer whose gradient was always 0 counts as cut off.
MAX_ZERO_STEPS = 10


class GradientCheck:
    """Check that the gradient reaches every adapted layer. It is active inside ``with check:`` only.

    A layer that was called, but whose output got no gradient, is cut off. A layer whose gradient is 0 is checked again
    for a few steps, because masks or saturation can cause that. A layer that was not called (an expert without rows) is
    accepted. The check ends as soon as every layer has passed.

    Args:
        blora: The LLM.
    """

    def __init__(self, blora: BayesianLoRA) -> None:
        self.blora = blora
        self.adapter: Adapter = blora.adapter
        self.steps = 0
        self.called: set[int] = set()
        self.reached: set[int] = set()
        self.waiting: set[int] = set()
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "GradientCheck":
        self.steps = 0
        self.called, self.reached = set(), set()
        self.waiting = {i for i, pair in enumerate(self.adapter.factors()) if any(p.requires_grad for p in pair)}
        self._hooks = [
            cast(nn.Module, layer).register_forward_hook(partial(self._watch, i))
            for i, layer in enumerate(self.adapter.layers)
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __call__(self, loss: Tensor) -> None:
        """Check ``.grad`` after a backward pass, if the loss is finite.

        Raises:
            RuntimeError: No gradient reaches some layers; the message names them.
        """
        if not self._hooks or is_capturing() or not torch.isfinite(loss):
            return
        self.steps += 1
        factors = self.adapter.factors()
        self.waiting = {i for i in self.waiting if not any(_is_moved(p) for p in factors[i])}
        checked = self.waiting & self.called
        cut = checked - self.reached
        if not cut and checked and self.steps >= MAX_ZERO_STEPS and not self._masks():
            cut = checked
        if cut:
            self.close()
            raise RuntimeError(
                f"No gradient reaches {name_layers(self.adapter, sorted(cut))}. They would never learn. {CAUSES} If "
                "the model does not use their outputs for this task, leave them out: bayesian_lora(..., "
                "exclude_modules=[...])."
            )
        if not checked or self.steps >= MAX_ZERO_STEPS:
            self.close()

    def close(self) -> None:
        """Remove the hooks and end the check."""
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


def _is_moved(parameter: Tensor) -> bool:
    grad = parameter.grad
    return parameter.requires_grad and grad is not None and bool((grad != 0).any())  # the step itself detects NaN
