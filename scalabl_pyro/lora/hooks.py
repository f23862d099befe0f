"""Sends a module's layers, heads and blocks through what its adapter binds, and freezes the rest."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .hidden_state_cache import HiddenStates, SkippableForward
from .last_token import AtPosition, ReadPosition, tokenwise_end
from .layers import ReplaceHead, SubspaceVariant
from .shared_prefix import RepeatRows, split_blocks
from .targets import output_head


def activate(adapter: Adapter, heads: Sequence[str]) -> None:
    """Send the layers through the latents, freeze everything but factors and heads, and add the hooks."""
    module, hooks = adapter.module, adapter.undo.hooks
    for index, layer in enumerate(adapter.layers):
        layer.lora_variant[adapter.adapter_name] = SubspaceVariant(adapter, index)
        layer.cast_input_dtype_enabled = False  # no float32 copy of the activations
    module.requires_grad_(False)
    for pair in adapter.factors():
        for factor in pair:
            factor.requires_grad_(True)
    for name in heads:
        original = module.get_submodule(name)
        adapter.heads[name] = copy.deepcopy(original).to(_master_dtype(original)).requires_grad_(True)
        hooks.append(original.register_forward_hook(ReplaceHead(adapter, name)))
    lower, upper = split_blocks(module, adapter.subspace.names)
    adapter.blocks = tuple(upper)
    head = output_head(module)
    if head is None:  # classifiers pool by the rows of their input
        return
    hooks.append(head.register_forward_pre_hook(ReadPosition(adapter.positions)))
    if (mlp := tokenwise_end(upper)) is not None:
        _replace_forward(adapter, mlp, AtPosition(adapter.positions, mlp.forward))
    if not lower:
        return
    adapter.shares_prefix = True
    adapter.has_fixed_prefix = all(module.get_submodule(name) is head for name in heads)
    hooks.append(upper[0].register_forward_pre_hook(HiddenStates(adapter), with_kwargs=True))
    for block in lower:
        _replace_forward(adapter, block, SkippableForward(adapter, block.forward))
    for block in upper:
        hooks.append(block.register_forward_pre_hook(RepeatRows(adapter.fan_out), with_kwargs=True))


def _replace_forward(adapter: Adapter, module: nn.Module, forward: Callable[..., Any]) -> None:
    adapter.undo.forwards.append((module, module.__dict__.get("forward")))
    module.forward = forward


def _master_dtype(module: nn.Module) -> torch.dtype:
    """At least float32, so that small updates are not rounded away."""
    return torch.promote_types(next(module.parameters()).dtype, torch.float32)
