"""Gradient checkpointing: a block stores only its input, and runs again in the backward pass (Chen et al., 2016).

The second run of a block must use the same draws as the first run. Draws are bound in context variables. The backward
pass often runs in another thread, which does not have these variables. The second run therefore uses a copy of the
context of the first run.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .adapter import Adapter


@contextmanager
def recompute(blocks: Sequence[nn.Module], *, has_dropout: bool = False) -> Iterator[None]:
    """Recompute ``blocks`` in the backward pass of everything that is computed inside the context.

    Args:
        blocks: Blocks of the model that hold trained parameters, and all blocks above them.
        has_dropout: Whether the blocks use dropout. The second run then restores the random state of the first run, so
            that it draws the same masks.
    """
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = RunAgain(block.forward, has_dropout)
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def dropouts_of(adapter: Adapter) -> list[nn.Dropout]:
    """Return the dropouts of the LoRA layers; empty if their rate is 0."""
    every = (dropout for layer in adapter.layers for dropout in layer.lora_dropout.values())
    return [dropout for dropout in every if isinstance(dropout, nn.Dropout)]


class RunAgain:
    """Function that stores only its input, and runs again in the backward pass with the draws of its first run.

    Args:
        forward: The function, such as ``forward`` of a block.
        has_dropout: Whether it uses dropout, see :func:`recompute`.
    """

    def __init__(self, forward: Callable[..., Any], has_dropout: bool) -> None:
        self.forward = forward
        self.has_dropout = has_dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        context = contextvars.copy_context()

        def run(*args: Any, **kwargs: Any) -> Any:
            return context.copy().run(self.forward, *args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=self.has_dropout, **kwargs)
