"""A copy of the base model without Bayesian LoRA and without PEFT, which may share the memory of its weights."""

import copy
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from .._process.lock import LOCK
from .adapter import Adapter
from .attach import find_adapter
from .base_module import PEFT_WRAPPERS
from .float8 import float8_layers
from .sharding import is_sharded


def plain_copy(adapter: Adapter, *, share: bool) -> nn.Module:
    """Copy the base model of an adapter, as it was before PEFT and this library changed it.

    Layers in 8-bit floats have their original precision in the copy, so their weights take memory of the device.

    Biases that PEFT trained in place keep their trained values.

    Args:
        adapter: Adapter inside the model.
        share: Whether the copy uses the weights of the original, so that it takes hardly any memory. Vectors, such as
            biases, are copied in any case. Nothing may write to the shared weights.

    Raises:
        ValueError: The weights are split over several processes.
    """
    if is_sharded(adapter.module):
        raise ValueError(
            "The weights are split over several processes, so no plain copy can be made. Save the posterior, load it "
            "in one process with Posterior.from_pretrained(llm, path), and export it there."
        )
    with LOCK:
        memo = _options_to_copy(adapter) | _codes(adapter) | (_shared(adapter) if share else {})
        if adapter.original is not adapter.module and not isinstance(adapter.original, PEFT_WRAPPERS):
            memo[id(adapter.original)] = None  # a compiled model around the module cannot be copied
        copied = copy.deepcopy(adapter.module, memo)
        found = find_adapter(copied)
        if found is None:
            raise RuntimeError("The copy of the model lost its adapter. Please report this.")
        found.unload()
    copied = _without_peft(copied)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(copied):
            delattr(copied, name)
    return copied.requires_grad_(False).eval()


def _options_to_copy(adapter: Adapter) -> dict[int, Any]:
    """Map the id of each layer's options to options that can be copied: PEFT keeps views of tied factors in them."""
    options = [vars(m)["kwargs"] for m in adapter.module.modules() if isinstance(vars(m).get("kwargs"), dict)]
    return {id(given): {key: v for key, v in given.items() if key != "tied_adapter"} for given in options}


def _codes(adapter: Adapter) -> dict[int, Any]:
    """Map the id of each buffer of layers in 8-bit floats to itself: the copy gets the original layers instead."""
    layers = [layer for layer in float8_layers(adapter.module) if layer.original is not None]
    return {id(buffer): buffer for layer in layers for buffer in layer.buffers()}


def _shared(adapter: Adapter) -> dict[int, Any]:
    """Map the id of each frozen weight to a parameter with the same memory; quantized ones to themselves."""
    own = {id(p) for pair in adapter.factors() for p in pair}
    shared: dict[int, Any] = {}
    held = [layer.original.weight for layer in float8_layers(adapter.module) if layer.original is not None]
    for tensor in (*adapter.module.parameters(), *adapter.module.buffers(), *held):
        if id(tensor) not in own and tensor.dim() > 1:
            shared[id(tensor)] = _alias(tensor)
    return shared


def _alias(tensor: Tensor) -> Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.data, requires_grad=False)
    return tensor.detach() if type(tensor) is torch.Tensor else tensor


def _without_peft(module: nn.Module) -> nn.Module:
    """Replace the layers and wrappers of PEFT inside a module by what they wrap, and return what stands for it."""
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    elif isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    while isinstance(module, BaseTunerLayer | TrainableTokensLayer):
        module = module.get_base_layer()
    for name, child in list(module.named_children()):
        setattr(module, name, _without_peft(child))
    return module
