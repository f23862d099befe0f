"""Computations that replace those of the module in a forward pass: adapted layers and new heads (torch and peft only).

For a layer with frozen weight W0 (out x in), factors A (r x in), B (out x r) and gamma = lora_alpha / r,

    y = W0 x + gamma * B (s * (A x))                      (Samplawski et al., UAI 2025, section 3)

PEFT injects the layers and computes the first term. A LoRA *variant*, PEFT's extension point, computes the second term.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor

from .adapter import Adapter
from .binding import RowNoise


class ReplaceHead:
    """Replacement for ``forward`` of a new head: the trained copy runs, in the dtype of that copy (float32).

    The original does not run. Behind another trained head it would get float32 inputs, but may have another dtype.

    Args:
        adapter: Adapter that holds the trained copy.
        name: Path of the head in the module.
        forward: The head's own ``forward``.
    """

    def __init__(self, adapter: Adapter, name: str, forward: Callable[..., Any]) -> None:
        self.adapter = adapter
        self.name = name
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the trained head in place of that of the original head."""
        head = self.adapter.current_head(self.name)
        if head is None:
            return self.forward(*args, **kwargs)
        like = next(head.parameters())
        cast = {key: _cast_floats(value, like) for key, value in kwargs.items()}
        return head(*(_cast_floats(value, like) for value in args), **cast)


def _cast_floats(value: Any, like: Tensor) -> Any:
    return value.to(like) if torch.is_tensor(value) and value.is_floating_point() else value


class SubspaceVariant(LoraVariant):
    """PEFT LoRA variant that multiplies A x by the latents of the present pass.

    Args:
        adapter: Adapter that binds factors and latents.
        index: Index of the layer in the subspace.
    """

    def __init__(self, adapter: Adapter, index: int) -> None:
        self.adapter = adapter
        self.index = index

    def supports_lora_conversion(self) -> bool:
        """Return False: a distribution over updates is not a single update."""
        return False

    def forward(  # type: ignore[override]  # PEFT declares a static method, but calls it on the instance
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Add gamma * B (s * (A x)) to ``result`` = W0 x."""
        bound = self.adapter.current_layer(self.index)
        if bound is None:
            return result
        A, B, s = bound
        x = module.lora_dropout[active_adapter](x).to(result.device)  # a device map moves x only for W0
        hidden = F.linear(x, A.to(x.dtype))
        noise = self.adapter.current_noise(self.index)
        if noise is not None:
            hidden = hidden + self._noise(noise, x)
        hidden = (hidden * self._align(s, hidden)).to(x.dtype)
        if not result.is_contiguous():
            return result + F.linear(hidden, B.to(x.dtype))
        delta = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), B.to(x.dtype).T)
        return delta.view_as(result)

    def _noise(self, noise: RowNoise, x: Tensor) -> Tensor:
        if noise.inputs is not None:
            x = x * self._align(noise.inputs.to(x), x)
        added = F.linear(x, noise.matrix.to(x))
        return added if noise.outputs is None else added * self._align(noise.outputs.to(added), added)

    def _align(self, s: Tensor, hidden: Tensor) -> Tensor:
        """Reshape (rows, n) numbers to (rows, 1, ..., 1, n), to multiply activations (rows, ..., n)."""
        if s.dim() == 1:
            return s
        if hidden.shape[0] != s.shape[0]:
            name = self.adapter.subspace.names[self.index]
            raise ValueError(
                f"Layer {name!r} received {hidden.shape[0]} rows, but the batch has {s.shape[0]} rows. The model mixes "
                "or flattens rows before this layer (mixture of experts, packed sequences, tokens before rows as in "
                "XLNet), so each row cannot have its own draw. Train with draws='shared' and predict with "
                "draws_per_pass=1, or remove this layer from target_modules."
            )
        return s.view(s.shape[0], *([1] * (hidden.dim() - 2)), s.shape[1])

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Add nothing: the module does not hold the latents."""

    @staticmethod
    def _refuse_merge(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "A Bayesian LoRA layer holds a distribution over weights and cannot be merged into one weight. "
            "Predict with posterior.predict(...), or call blora.unload() to get the original module back."
        )

    merge_safe = merge_unsafe = unmerge = _refuse_merge
