"""Installation of an adapter in a module: its layers, heads and blocks use the adapter, and the rest is frozen."""

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .adapter import Adapter
from .base_tensors import unwrap_active
from .hidden_state_cache import HiddenStates, SkippableForward
from .layers import ReplaceHead, SubspaceVariant
from .module_changes import ModuleChanges
from .read_tokens import AtPositions, ReadOut, ReadPositions, tokenwise_end
from .refuse_save import refuse_saving
from .shared_prefix import RepeatRows
from .subspace import Layer, Subspace
from .targets import is_encoder_decoder, output_head


def activate(
    module: nn.Module,
    layers: Mapping[str, LoraLayer],
    *,
    adapter_name: str,
    loc: Tensor,
    changes: ModuleChanges,
    gauge: str,
    heads: Sequence[str],
    base_tensors: Mapping[str, Tensor] | None = None,
    original: nn.Module | None = None,
) -> Adapter:
    """Build the adapter of LoRA layers that the module already has, connect them to it, and freeze the base model.

    Args:
        module: Module that contains the layers.
        layers: PEFT LoRA layers by path.
        adapter_name: Name of the adapter in PEFT.
        loc: Initial s, (D,).
        changes: Record of the changes to the module, to which this function adds its own.
        gauge: Gauge of the factors, ``"unit_rows"`` or ``"free"``; see :class:`~scalabl_pyro.lora.adapter.Adapter`.
        heads: Paths of modules to train in full.
        base_tensors: Tensors of the module that its checkpoint does not hold, by name; see ``base_tensors``.
        original: Module that ``unload`` returns; None means ``module``.

    Returns:
        Adapter that computes at ``loc`` until a pass binds a draw.
    """
    module.requires_grad_(False)
    adapter = Adapter(
        module,
        tuple(layers.values()),
        _subspace(layers, adapter_name),
        adapter_name=adapter_name,
        loc=loc,
        changes=changes,
        gauge=gauge,
        heads={name: _trainable_copy(module.get_submodule(name)) for name in heads},
        base_tensors=base_tensors,
        original=original,
    )
    for index, layer in enumerate(adapter.layers):
        changes.set_variant(layer, adapter_name, SubspaceVariant(adapter, index))
    for pair in adapter.factors():
        for factor in pair:
            factor.requires_grad_(True)
    for name in heads:
        head = module.get_submodule(name)
        changes.replace_forward(head, ReplaceHead(adapter, name, head.forward))
    _add_hooks(adapter, changes)
    refuse_saving(module if original is None else original, changes)
    return adapter


def _add_hooks(adapter: Adapter, changes: ModuleChanges) -> None:
    """Add the hooks that save work.

    The output head and the last MLP compute only the token that is read. The blocks below the first adapted one run
    once for all draws.
    """
    head = output_head(adapter.module)
    if head is None:  # a classifier pools over tokens, with the rows of its input
        return
    changes.add_hook(head.register_forward_pre_hook(ReadPositions(adapter.current_positions)))
    changes.replace_forward(head, ReadOut(adapter.current_readout, head.forward))
    # The blocks of an encoder-decoder may be those of its encoder.
    mlp = None if is_encoder_decoder(adapter.module) else tokenwise_end(adapter.blocks)
    if mlp is not None:
        changes.replace_forward(mlp, AtPositions(adapter.current_positions, mlp.forward))
    if not adapter.shares_prefix:
        return
    changes.add_hook(adapter.blocks[0].register_forward_pre_hook(HiddenStates(adapter), with_kwargs=True))
    for block in adapter.blocks_below:
        changes.replace_forward(block, SkippableForward(adapter, block.forward))
    for block in adapter.blocks:
        changes.add_hook(block.register_forward_pre_hook(RepeatRows(adapter.current_fan_out), with_kwargs=True))


def _subspace(layers: Mapping[str, LoraLayer], adapter_name: str) -> Subspace:
    return Subspace(
        tuple(
            Layer(name, layer.r[adapter_name], cast(int, layer.in_features), cast(int, layer.out_features))
            for name, layer in layers.items()
        )
    )


def _trainable_copy(module: nn.Module) -> nn.Module:
    """Return a copy in float32 or higher, because half precision would round small updates away."""
    own = unwrap_active(copy.deepcopy(module))
    dtype = torch.promote_types(next(own.parameters()).dtype, torch.float32)
    return own.to(dtype).requires_grad_(True)
