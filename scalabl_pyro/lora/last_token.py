"""Only one token of each row is read: what follows the last mixing of tokens is computed for it alone.

That is the output head, whose logits (rows, tokens, vocabulary) are then never built, and the MLP of the last block:
one thirtieth of the arithmetic of a model of 28 blocks, forward and backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Positions = Callable[[], Tensor | None]
"""Tells the (rows,) positions that the current pass reads; None if it reads all."""


class ReadPosition:
    """Forward pre-hook of the output head: keep one token of each row.

    Args:
        positions: Positions of the current pass.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Arguments of the head."""
        positions = self.positions()
        if positions is None:
            return None
        hidden, *rest = args
        return (_pick(hidden, positions), *rest)


class AtPosition:
    """``forward`` of a module that treats each token alone: run it on the token that is read, give 0 to the others.

    Args:
        positions: Positions of the current pass.
        forward: The module's own forward.
    """

    def __init__(self, positions: Positions, forward: Callable[..., Any]) -> None:
        self.positions = positions
        self.forward = forward

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output (rows, tokens, width)."""
        positions = self.positions()
        if positions is None or hidden.dim() != 3 or len(hidden) != len(positions) or hidden.shape[1] == 1:
            return self.forward(hidden, *args, **kwargs)
        picked = self.forward(_pick(hidden, positions), *args, **kwargs)
        index = positions.to(hidden.device).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
        return torch.zeros_like(hidden).scatter(1, index, picked)


def tokenwise_end(blocks: Sequence[nn.Module]) -> nn.Module | None:
    """The MLP of the last block, whose result for one token depends on that token alone; None if the model has none.

    Only dense ones by the name that Llama, Qwen, Mistral, Gemma, Phi and GPT-2 give them: a mixture of experts hands
    its routing on.
    """
    mlp = getattr(blocks[-1], "mlp", None) if blocks else None
    is_dense = isinstance(mlp, nn.Module) and not hasattr(mlp, "experts") and not hasattr(mlp, "gate")
    return mlp if is_dense else None


def _pick(hidden: Tensor, positions: Tensor) -> Tensor:
    """(rows, 1, width): the token of each row."""
    positions = positions.to(hidden.device)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), positions].unsqueeze(1)
