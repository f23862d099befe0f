"""Records each change to the user's module, so that all of them can be reverted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .float8 import Float8Linear
from .tensors import set_tensor

#: Whether a 4-bit layer of bitsandbytes may pack its weights on this CPU.
PACKS = "support_avx512bf16_for_cpu"


@dataclass
class ModuleChanges:
    """The changes to one module.

    The record is data rather than closures, so that a deep copy of the module reverts its own changes.

    Args:
        module: Module that is about to be changed; its ``requires_grad`` flags are recorded now.
    """

    module: nn.Module
    _flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    _replaced: dict[str, nn.Module] = field(default_factory=dict)
    _converted: list[tuple[nn.Module, str, Float8Linear]] = field(default_factory=list)
    _attributes: list[str] = field(default_factory=list)
    _weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _tensors: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    _set: list[tuple[nn.Module, str]] = field(default_factory=list)
    _packers: list[nn.Module] = field(default_factory=list)
    _ranks: list[tuple[LoraLayer, str, int]] = field(default_factory=list)
    _variants: list[tuple[LoraLayer, str, bool]] = field(default_factory=list)
    _hooks: list[RemovableHandle] = field(default_factory=list)
    _forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._flags = [(p, p.requires_grad) for p in self.module.parameters()]
        self._keep_gradients()

    def _keep_gradients(self) -> None:
        """Keep 4-bit layers of bitsandbytes from packing their weights for inference on a CPU with AVX512-BF16.

        A pass without gradients packs them, and no gradient goes through packed weights.
        """
        self._packers = [part for part in self.module.modules() if getattr(part, PACKS, False)]
        for part in self._packers:
            setattr(part, PACKS, False)

    def record_layers(self, layers: dict[str, nn.Module]) -> None:
        """Record submodules, by path, that are about to be replaced."""
        self._replaced.update(layers)

    def record_new_attribute(self, name: str) -> None:
        """Record an attribute that the module is about to get, unless it has one already."""
        if not hasattr(self.module, name):
            self._attributes.append(name)

    def record_weights(self, weights: Iterable[Tensor]) -> None:
        """Give tensors values of their own, which may be changed; the old ones, perhaps shared, are kept aside."""
        for weight in weights:
            self._weights.append((weight, weight.data))
            weight.data = weight.data.clone()

    def record_rank(self, layer: LoraLayer, adapter_name: str) -> None:
        """Record the rank of a PEFT layer, which is about to be cut."""
        self._ranks.append((layer, adapter_name, layer.r[adapter_name]))

    def replace_tensor(self, name: str, value: Tensor) -> None:
        """Replace one parameter or buffer of the module by a frozen tensor; others that were tied to it stay.

        Args:
            name: Name of the parameter or buffer.
            value: New value, which is moved to the device and cast to the dtype of the old one.
        """
        self._tensors.append(set_tensor(self.module, name, value))

    def convert_layer(self, parent: nn.Module, name: str, layer: Float8Linear) -> None:
        """Replace a linear layer by one in 8-bit floats, and move the weight of the old layer to host memory."""
        self._converted.append((parent, name, layer))
        setattr(parent, name, layer)
        layer.move_original(torch.device("cpu"))

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Set an attribute of one instance that hides an attribute of its class."""
        if name not in vars(module):
            self._set.append((module, name))
            setattr(module, name, value)

    def set_variant(self, layer: LoraLayer, adapter_name: str, variant: LoraVariant) -> None:
        """Let ``variant`` compute the update of a PEFT layer, without PEFT's float32 copy of the activations."""
        self._variants.append((layer, adapter_name, layer.cast_input_dtype_enabled))
        layer.lora_variant[adapter_name] = variant
        layer.cast_input_dtype_enabled = False

    def add_hook(self, handle: RemovableHandle) -> None:
        """Record a hook that was registered."""
        self._hooks.append(handle)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Replace the ``forward`` of one instance; one that was replaced before (by accelerate) is recorded."""
        self._forwards.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def revert(self) -> None:
        """Make the module what it was before, bit for bit; a second call does nothing."""
        for handle in self._hooks:
            handle.remove()
        for module, name in self._set:
            delattr(module, name)
        for module in self._packers:
            setattr(module, PACKS, True)
        for module, forward in reversed(self._forwards):
            del module.forward
            if forward is not None:
                module.forward = forward
        for layer, adapter_name, casts_input in self._variants:
            layer.lora_variant.pop(adapter_name, None)
            layer.cast_input_dtype_enabled = casts_input
        for weight, data in self._weights:
            weight.data = data.to(weight.device)
        for layer, adapter_name, rank in self._ranks:
            layer.r[adapter_name] = rank
        for parent, name, converted in self._converted:
            setattr(parent, name, converted.restored())
        for name, original in self._replaced.items():
            self.module.set_submodule(name, original)
        for owner, key, tensor in self._tensors:
            kept: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
            tensor.data = tensor.data.to(kept[key].device)
            kept[key] = tensor
        for name in self._attributes:
            delattr(self.module, name)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._ranks.clear()
        for record in (self._hooks, self._forwards, self._variants, self._weights, self._attributes, self._flags):
            record.clear()
        self._set.clear()
        self._packers.clear()
        self._converted.clear()
        self._tensors.clear()
        self._replaced.clear()
