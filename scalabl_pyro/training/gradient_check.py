"""Checks in the first steps that the gradient reaches every adapted layer."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..lora.adapter import Adapter
from ..model.bayesian_lora import BayesianLoRA
from ..priors.sites import prior_sites
from .messages import CAUSES, name_layers

#: Steps after which a layer whose gradient was always 0 is taken to be cut off.
MAX_ZERO_STEPS = 10


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
                f"No gradient reaches {name_layers(self.adapter, sorted(cut))}. They would never learn. {CAUSES}"
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


def _is_captured() -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_moved(parameter: Tensor) -> bool:
    grad = parameter.grad
    return parameter.requires_grad and grad is not None and bool((grad != 0).any())  # NaN is dealt with elsewhere
