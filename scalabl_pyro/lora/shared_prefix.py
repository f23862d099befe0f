"""Blocks below the first adapted one depend neither on s nor on anything that is trained.

Within a pass they run once for all draws: a batch of B rows under P draws needs P * B rows only from the first adapted
block on. Hooks of the blocks repeat the hidden states there, and for each later block what the model hands it by row
(attention mask, rotary angles). Over several passes their result can be kept: inside ``reuse(prefix)`` the first pass
fills ``prefix``, and later ones skip these blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .module_paths import block_of
from .targets import output_head


class RepeatRows:
    """Forward pre-hook (with kwargs) of an adapted block: repeat for the draws what has only the rows of the input.

    Args:
        fan_out: tells (batch_shape, rows) of the current pass, or None.
    """

    def __init__(self, fan_out: Callable[[], tuple[torch.Size, int] | None]) -> None:
        self.fan_out = fan_out

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of the block with all rows."""
        shape = self.fan_out()
        if shape is None:
            return None
        return repeat_rows(args, *shape, min_dim=2), repeat_rows(kwargs, *shape, min_dim=2)


def repeat_rows(x: Any, batch_shape: torch.Size, rows: int, *, min_dim: int = 1) -> Any:
    """Repeat each tensor of ``rows`` rows in a nest of tuples and dicts to ``batch_shape``, draws first.

    Args:
        x: a tensor (rows, ...), anything else (returned as it is), or a nest of both.
        batch_shape: (*draws, rows).
        rows: B.
        min_dim: tensors of fewer dimensions are left alone (positions in a sequence may count B by chance).
    """
    if torch.is_tensor(x):
        if x.dim() < min_dim or x.dim() == 0 or x.shape[0] != rows:
            return x
        return x.expand(*batch_shape, *x.shape[1:]).reshape(-1, *x.shape[1:])
    if isinstance(x, dict):
        return {k: repeat_rows(v, batch_shape, rows, min_dim=min_dim) for k, v in x.items()}
    if type(x) in (tuple, list):
        return type(x)(repeat_rows(v, batch_shape, rows, min_dim=min_dim) for v in x)
    return x


def split_blocks(module: nn.Module, names: Sequence[str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks below the first adapted one and those from it on.

    Both are empty where an adapted layer is neither in a block nor the LM head, or where the module has no single stack
    of blocks (encoder and decoder, several modalities).
    """
    head = output_head(module)
    inside = [name for name in names if module.get_submodule(name) is not head]
    found = [block for name in inside if (block := block_of(name)) is not None and name != block.path]
    if not inside or len(found) < len(inside) or len({block.stack for block in found}) != 1:
        return [], []
    stack = module.get_submodule(found[0].stack)
    first = min(block.index for block in found)
    if not isinstance(stack, nn.ModuleList):
        return [], []
    return list(stack)[:first], list(stack)[first:]
