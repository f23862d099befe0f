"""Checks that layers can carry LoRA factors and latents, before anything is changed."""

from collections.abc import Iterable, Sequence

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._errors import nearest

#: PEFT layers that ask a LoRA variant for their update; other layers would silently ignore the latents.
SUPPORTED_LAYERS = (
    "Linear",  # nn.Linear and GPT-2's Conv1D
    "Linear8bitLt",
    "Linear4bit",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "TorchaoLoraLinear",
)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def check_rank(module: nn.Module, names: Sequence[str], r: int) -> None:
    """Raise if ``r`` is not a rank that the layers with these paths can have."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r={r!r}: the rank must be a positive integer.")
    for name in names:
        shape = shape_of(module.get_submodule(name))
        if r > min(shape):
            raise ValueError(
                f"r={r} is larger than layer {name!r} with weight {shape[0]} x {shape[1]} (out x in) allows: use "
                f"r <= {min(shape)}, or leave the layer out of target_modules."
            )


def check_layers(names: Iterable[str], layers: Iterable[object]) -> None:
    """Raise if PEFT put in a kind of layer that ignores the latents."""
    for name, layer in zip(names, layers, strict=True):
        kind = type(layer).__name__
        if kind not in SUPPORTED_LAYERS or not isinstance(layer, LoraLayer):
            raise TypeError(
                f"{name!r} is a PEFT {kind}, which would ignore the latents silently. Supported: "
                f"{', '.join(SUPPORTED_LAYERS)}. Leave the layer out of target_modules."
            )


def check_heads(module: nn.Module, heads: Sequence[str]) -> None:
    """Raise if a name in ``modules_to_save`` is missing in the module, or has no parameters."""
    names = dict(module.named_modules())
    for name in heads:
        if name not in names:
            raise ValueError(f"modules_to_save: the module has no {name!r}. {nearest(name, [n for n in names if n])}")
        if next(names[name].parameters(), None) is None:
            raise ValueError(f"modules_to_save: {name!r} has no parameters to train.")
