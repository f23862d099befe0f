"""Compute the last steps of a model only for the tokens whose logits are read: one per row, or a few.

The last attention layer is the last step that mixes tokens. After it, other tokens no longer matter. So the MLP of the
last block and the output head run on the tokens that are read. The logits of shape (rows, tokens, vocabulary) are never
built. Skipping the MLP for the other tokens saves one thirtieth of the arithmetic of a model with 28 blocks, forward
and backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .binding import Readout

Positions = Callable[[], Tensor | None]
"""Function that returns the positions read by the current pass, (rows,) or (rows, T); None if it reads all tokens."""


class ReadPositions:
    """Forward pre-hook of the output head that keeps the tokens that are read.

    Args:
        positions: Function that returns the positions read by the current pass.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the arguments of the head, or None to leave them unchanged.

        Raises:
            ValueError: The input of the head is not one vector per token.
        """
        positions = self.positions()
        if positions is None:
            return None
        hidden, *rest = args
        if hidden.dim() != 3:
            raise ValueError(
                f"The output head gets hidden states of shape {tuple(hidden.shape)}, expected (rows, tokens, width). "
                "So the tokens that a task reads cannot be found. Use another model: one such as ProphetNet, which "
                "predicts several tokens at each place, does not work."
            )
        return (_pick(hidden, positions), *rest)


class ReadOut:
    """Replacement for ``forward`` of the output head that gives its input to the readout of the pass.

    Args:
        readout: Function that returns the readout of the current pass, or None if the head computes logits.
        forward: The head's own ``forward``.
    """

    def __init__(self, readout: Callable[[], Readout | None], forward: Callable[..., Any]) -> None:
        self.readout = readout
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits, or what the readout computes in their place."""
        readout = self.readout()
        return self.forward(*args, **kwargs) if readout is None else readout(self.forward, *args, **kwargs)


class AtPositions:
    """Replacement for ``forward`` of a module that treats each token alone.

    The module runs on the tokens that are read. The other tokens get 0.

    Args:
        positions: Function that returns the positions read by the current pass.
        forward: The module's own ``forward``.
    """

    def __init__(self, positions: Positions, forward: Callable[..., Any]) -> None:
        self.positions = positions
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output, shape (rows, tokens, width)."""
        positions = self.positions()
        first = next((x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), None)
        if (
            positions is None
            or first is None
            or first.dim() != 3
            or len(first) != len(positions)
            or first.shape[1] <= _per_row(positions).shape[1]
        ):
            return self.forward(*args, **kwargs)

        def pick(x: Any) -> Any:  # BLOOM's MLP gets the residual stream too
            is_per_token = torch.is_tensor(x) and x.shape[:2] == first.shape[:2]
            return _pick(x, positions) if is_per_token else x

        picked = self.forward(*map(pick, args), **{name: pick(x) for name, x in kwargs.items()})
        index = _per_row(positions)
        if not torch.is_tensor(picked) or picked.shape[:2] != index.shape or picked.dim() != 3:
            return self.forward(*args, **kwargs)
        return _put_back(picked, index.to(picked.device), first.shape[1])


def tokenwise_end(blocks: Sequence[nn.Module]) -> nn.Module | None:
    """Return the MLP of the last block, or None if it has no dense MLP.

    The MLP's result for one token depends on that token alone. It is found by its name, ``mlp``, as in Llama, Qwen,
    Mistral, Gemma, Phi and GPT-2. A mixture of experts is left out, because it also returns the routing of all tokens.

    Args:
        blocks: Blocks of the model, in order.
    """
    mlp = getattr(blocks[-1], "mlp", None) if blocks else None
    is_dense = isinstance(mlp, nn.Module) and not hasattr(mlp, "experts") and not hasattr(mlp, "gate")
    return mlp if is_dense else None


def _per_row(positions: Tensor) -> Tensor:
    """Return positions as (rows, T)."""
    return positions.unsqueeze(1) if positions.dim() == 1 else positions


def _pick(hidden: Tensor, positions: Tensor) -> Tensor:
    """Select the tokens that are read. The result has shape (rows, T, width)."""
    index = _per_row(positions).to(hidden.device)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1), index]


def _put_back(picked: Tensor, index: Tensor, width: int) -> Tensor:
    """Return (rows, width, features) with the picked tokens at their positions, and 0 elsewhere.

    A position may occur twice in a row, as in rows that are filled up. Its gradient must then flow back once, which
    ``scatter`` does not do.
    """
    rows, count = index.shape
    if count == 1:
        return picked.new_zeros(rows, width, picked.shape[2]).scatter(1, index.unsqueeze(-1).expand_as(picked), picked)
    place = torch.full((rows, width), count, device=index.device)
    place = place.scatter(1, index, torch.arange(count, device=index.device).expand(rows, count))
    with_zero = F.pad(picked, (0, 0, 0, 1))
    return with_zero.gather(1, place.unsqueeze(-1).expand(-1, -1, picked.shape[2]))
