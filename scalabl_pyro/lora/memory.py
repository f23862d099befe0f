"""Estimate the memory of a training step from what autograd saves for one row and for two rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._display import Summarized
from .adapter import Adapter
from .float8 import float8_layers
from .forward import AdaptedLLM
from .gradient_checkpointing import recompute
from .sharding import is_piece
from .train_mode import sole_use

#: Bytes per trained parameter: its float32 value, its value before the update, its gradient, and two moments of AdamW.
BYTES_PER_PARAMETER = 20

Pass = Callable[[AdaptedLLM, Tensor, int], Any]
"""Function that runs the forward pass of a step on the first rows: LLM, latents (D,), number of rows."""


@dataclass(frozen=True)
class MemoryEstimate(Summarized):
    """Estimated bytes at the peak of a training step.

    Attributes:
        weights: Bytes of the weights that are not trained, mostly the frozen base model.
        trained: Bytes of the trained parameters, their copies, their gradients and AdamW's moments.
        activations: Bytes that the forward pass saves for the backward pass, for all rows.
        head: Bytes of the logits that the backward pass computes again at one time; 0 if all logits are saved. The
            output head runs in parts on long completions.
    """

    weights: int
    trained: int
    activations: int
    head: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.trained + self.activations + self.head

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._summary().items())

    def _summary(self) -> Mapping[str, object]:
        names = ("weights", "trained", "activations", *(["head"] if self.head else []), "total")
        return {name: f"{getattr(self, name) / 2**30:.2f} GiB" for name in names}


def estimate_memory(
    adapter: Adapter, inputs: Mapping[str, Any], *, positions: Tensor | None, gradient_checkpointing: bool
) -> MemoryEstimate:
    """Estimate the memory of a training step.

    One row runs forward, then two rows. The bytes that autograd saves are extrapolated linearly to all rows.

    Args:
        adapter: Adapter of the LLM.
        inputs: Keyword inputs of the LLM. Each tensor has shape (rows, ...).
        positions: Position of the token whose logits are read, per row, shape (rows,). None reads all tokens.
        gradient_checkpointing: Whether training recomputes blocks in the backward pass, as in
            :func:`scalabl_pyro.fit`.

    Returns:
        The estimate in bytes.
    """
    named = {**inputs} if positions is None else {**inputs, "positions": positions}
    rows = next(len(x) for x in inputs.values() if torch.is_tensor(x))

    def forward(llm: AdaptedLLM, s: Tensor, count: int) -> Any:
        part: dict[str, Any] = {k: x[:count].to(adapter.device) if torch.is_tensor(x) else x for k, x in named.items()}
        return llm(**part, s=s)

    return estimate_step(adapter, forward, rows=rows, gradient_checkpointing=gradient_checkpointing)


def estimate_step(
    adapter: Adapter, forward: Pass, *, rows: int, gradient_checkpointing: bool, head: int = 0, first: int = 1
) -> MemoryEstimate:
    """Estimate the memory of a training step from its forward pass; see :func:`estimate_memory`.

    Args:
        adapter: Adapter of the LLM.
        forward: Forward pass of the step.
        rows: Number of rows of the batch.
        gradient_checkpointing: Whether training recomputes blocks in the backward pass.
        head: Bytes of the logits that the backward pass computes again at one time.
        first: Number of rows of the first pass; the second pass has one more. The bytes must be linear from there on.

    Returns:
        The estimate in bytes.
    """
    low = min(first, rows)

    def of_all_rows(again: tuple[nn.Module, ...] = ()) -> int:
        fewer, more = (_saved_bytes(adapter, forward, count, again=again) for count in (low, min(low + 1, rows)))
        return fewer + (rows - low) * (more - fewer)

    activations = of_all_rows()
    if gradient_checkpointing and adapter.blocks:
        # Autograd keeps the inputs of all blocks. While one block runs again, it also keeps all that this block saves.
        activations = of_all_rows(adapter.blocks) + activations // len(adapter.blocks)
    modules = [adapter.module, *adapter.heads.values()]
    own_tensors = (t for module in modules for t in (*module.parameters(), *module.buffers(), *_on_host(module)))
    tensors = {t.data_ptr(): t for held in own_tensors for t in (*_stored(held), *_of_quantization(held))}
    trained = sum(t.numel() for t in tensors.values() if t.requires_grad)
    own = sum(t.nbytes for t in tensors.values() if t.requires_grad)
    weights = sum(t.untyped_storage().nbytes() for t in tensors.values()) - own
    return MemoryEstimate(weights, BYTES_PER_PARAMETER * trained, activations, head)


def _on_host(module: nn.Module) -> Iterator[Tensor]:
    """Yield the original weights of layers in 8-bit floats, if these compute in the memory of the host too."""
    for layer in float8_layers(module):
        if layer.original is not None and layer.original.weight.device == layer.codes.device:
            yield layer.original.weight


def _stored(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that hold the numbers of a tensor: itself, or the codes and scales of one of torchao."""
    if is_piece(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _stored(getattr(tensor, name))


def _of_quantization(weight: Tensor) -> Iterator[Tensor]:
    """Yield the scales that bitsandbytes stores with a 4-bit weight, and the scales of quantized scales."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if torch.is_tensor(value))
        state = getattr(state, "state2", None)


def _saved_bytes(adapter: Adapter, forward: Pass, count: int, *, again: tuple[nn.Module, ...]) -> int:
    """Count the bytes that autograd saves in the forward pass of ``count`` rows.

    Each storage counts once, and weights do not count.
    """
    own = (*adapter.module.parameters(), *adapter.module.buffers())
    known = {t.untyped_storage().data_ptr() for held in own for t in _stored(held)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in (part.untyped_storage() for part in _stored(tensor)):
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor and its graph node would hold each other and never be freed

    s = adapter.loc.to(adapter.device).clone().requires_grad_(True)
    with (
        sole_use(adapter.module),
        torch.enable_grad(),
        recompute(again),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = forward(AdaptedLLM(adapter), s, count)
        del output  # kept until here, so that no storage is freed and its address reused during the pass
    return sum(kept.values())
