"""Gradient checkpointing: blocks keep their input alone and are run again in the backward pass (Chen et al., 2016).

A block that is run again must see the draws it saw the first time. Draws are bound in context variables, which the
backward pass, often in a thread of its own, does not have: so the context of the first run comes along.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recompute(blocks: Sequence[nn.Module], *, has_dropout: bool = False) -> Iterator[None]:
    """Run ``blocks`` again in backward passes of what is computed inside the context.

    Args:
        blocks: Blocks of a model that hold trained parameters, and those above them.
        has_dropout: whether the second run must draw the same masks, for which the random state is put back.
    """
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = _RunAgain(block.forward, has_dropout)
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


class _RunAgain:
    def __init__(self, forward: Callable[..., Any], has_dropout: bool) -> None:
        self.forward = forward
        self.has_dropout = has_dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()

        def run(*args: Any, **kwargs: Any) -> Any:
            return context.copy().run(self.forward, *args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=self.has_dropout, **kwargs)
