"""Run the blocks below the first adapted one only once for all draws.

These blocks depend neither on the latents s nor on any trained parameter. So a batch of B rows with P draws needs P * B
rows only from the first adapted block on. Hooks repeat the hidden states there. For each later block, hooks repeat the
other inputs with one entry per row (attention mask, rotary angles).

The result of these blocks can also be kept over several passes, see ``hidden_state_cache``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .module_paths import block_of
from .targets import output_head


class RepeatRows:
    """Forward pre-hook (with kwargs) of an adapted block: repeat inputs for the draws if they only have the B rows.

    Args:
        fan_out: Function that returns (batch_shape, rows) of the current pass, or None if nothing is to be repeated.
    """

    def __init__(self, fan_out: Callable[[], tuple[torch.Size, int] | None]) -> None:
        self.fan_out = fan_out

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the block with all rows, or None to leave them unchanged."""
        shape = self.fan_out()
        if shape is None:
            return None
        return repeat_rows(args, *shape, min_dim=2), repeat_rows(kwargs, *shape, min_dim=2)


def repeat_rows(x: Any, batch_shape: torch.Size, rows: int, *, min_dim: int = 1) -> Any:
    """Repeat each tensor that has ``rows`` rows for all draws, also inside nested tuples, lists and dicts.

    Args:
        x: Tensor of shape (rows, ...), another object (returned unchanged), or nested tuples, lists and dicts of them.
        batch_shape: Shape (*draws, rows) to repeat to.
        rows: Number of rows B.
        min_dim: Smallest number of dimensions of a tensor to repeat. A tensor with fewer dimensions may have length B
            by chance, such as the positions in a sequence.

    Returns:
        ``x`` with tensors of shape (draws * rows, ...), ordered by draw, then by row.
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


def first_row(x: Any, rows: int) -> Any:
    """Return the first row of each tensor that has ``rows`` rows, also inside nested tuples, lists and dicts."""
    if torch.is_tensor(x):
        return x[:1] if x.dim() > 0 and x.shape[0] == rows else x
    if isinstance(x, dict):
        return {k: first_row(v, rows) for k, v in x.items()}
    if type(x) in (tuple, list):
        return type(x)(first_row(v, rows) for v in x)
    return x


def split_blocks(module: nn.Module, names: Sequence[str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Split the blocks into those below the first adapted block and the rest.

    Both lists are empty if an adapted layer is neither in a block nor the LM head. They are also empty if the adapted
    layers do not lie in one single stack of blocks (encoder and decoder, several modalities).

    Args:
        module: The adapted module.
        names: Paths of the adapted layers.

    Returns:
        Blocks below the first adapted block, and blocks from the first adapted block on.
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
