"""Checks that a module still computes with the LoRA layers of an adapter: PEFT can switch them, or take them out."""

from collections.abc import Sequence

from peft.tuners.lora.layer import LoraLayer
from torch import nn


def check_in_place(module: nn.Module, names: Sequence[str], layers: Sequence[LoraLayer]) -> None:
    """Raise a RuntimeError if other code took layers out of the module, so that the latents would have no effect."""
    for name, layer in zip(names, layers, strict=True):
        try:
            present = module.get_submodule(name)
        except AttributeError:
            present = None
        if present is not layer:
            raise RuntimeError(
                f"The Bayesian LoRA layer {name!r} was taken out of the model, by unload() of PEFT for instance. "
                "Load the posterior with from_pretrained(), or call bayesian_lora() again."
            )


def check_active(names: Sequence[str], layers: Sequence[LoraLayer], adapter_name: str) -> None:
    """Raise a RuntimeError if PEFT would not compute with the factors of the adapter ``adapter_name``."""
    for name, layer in zip(names, layers, strict=True):
        active = list(layer.active_adapters)
        if layer.disable_adapters or layer.merged or active != [adapter_name]:
            state = "disabled its adapters" if layer.disable_adapters else f"activated {active}"
            state = f"merged {layer.merged_adapters}" if layer.merged else state
            raise RuntimeError(
                f"The posterior is on the PEFT adapter {adapter_name!r}, but PEFT has {state} in layer {name!r}. Undo "
                f"that with set_adapter({adapter_name!r}), enable_adapter_layers() or unmerge_adapter()."
            )
