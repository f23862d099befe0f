"""How much memory a training step will need, from what autograd keeps of one row and of two."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .forward import AdaptedLLM
from .gradient_checkpointing import recompute
from .train_mode import sole_use

#: float32 value, gradient and the two moments of AdamW.
BYTES_A_PARAMETER = 16


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step.

    Attributes:
        weights: Weights of the whole module in memory, mostly the frozen base.
        trained: gradients and AdamW's moments of what is trained, and its copies in the base's precision.
        activations: what the backward pass needs of the forward pass, for all rows.
    """

    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.trained + self.activations

    def __str__(self) -> str:
        parts = {name: getattr(self, name) for name in ("weights", "trained", "activations", "total")}
        return ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in parts.items())


def estimate_memory(
    adapter: Adapter, inputs: Mapping[str, Any], *, positions: Tensor | None, gradient_checkpointing: bool
) -> MemoryEstimate:
    """Run one row forward, then two, count what autograd saves, and go on in a straight line to all rows.

    Args:
        adapter: Adapter of the LLM.
        inputs: keyword inputs of the LLM, each tensor (rows, ...).
        positions: (rows,) the token of each row whose logits are read, or None.
        gradient_checkpointing: as in :func:`scalabl_pyro.fit`.
    """
    named = {**inputs} if positions is None else {**inputs, "positions": positions}
    rows = next(len(x) for x in inputs.values() if torch.is_tensor(x))

    def saved(count: int, again: tuple[nn.Module, ...] = ()) -> int:
        part = {k: x[:count].to(adapter.device) if torch.is_tensor(x) else x for k, x in named.items()}
        return _saved_bytes(adapter, part, again=again)

    def of_all_rows(again: tuple[nn.Module, ...] = ()) -> int:
        one, two = saved(1, again), saved(min(rows, 2), again)
        return one + (rows - 1) * (two - one)

    activations = of_all_rows()
    if gradient_checkpointing and adapter.blocks:
        # The inputs of all blocks, and while one block runs again all that it saves.
        activations = of_all_rows(adapter.blocks) + activations // len(adapter.blocks)
    modules = [adapter.module, *adapter.heads.values()]
    own_tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    tensors = {t.data_ptr(): t for held in own_tensors for t in (held, *_of_quantization(held))}
    trained = sum(t.numel() for t in tensors.values() if t.requires_grad)
    own = sum(t.numel() * t.element_size() for t in tensors.values() if t.requires_grad)
    weights = sum(t.untyped_storage().nbytes() for t in tensors.values()) - own
    return MemoryEstimate(weights, BYTES_A_PARAMETER * trained, activations)


def _of_quantization(weight: Tensor) -> Iterator[Tensor]:
    """The scales that bitsandbytes keeps beside the codes of a 4-bit weight, nested where they are quantized too."""
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if torch.is_tensor(value))
        state = getattr(state, "state2", None)


def _saved_bytes(adapter: Adapter, inputs: dict[str, Any], *, again: tuple[nn.Module, ...]) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, without those of the weights."""
    known = {t.untyped_storage().data_ptr() for t in (*adapter.module.parameters(), *adapter.module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the node that holds it, and never be freed

    s = adapter.loc.to(adapter.device).clone().requires_grad_(True)
    with (
        sole_use(adapter.module),
        torch.enable_grad(),
        recompute(again),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = AdaptedLLM(adapter)(**inputs, s=s)
        del output  # after the pass: until here no storage was freed and its address reused
    return sum(kept.values())
