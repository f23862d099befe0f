"""Checks that layers can carry LoRA factors and latents, before anything is changed."""

import numbers
from collections.abc import Iterable, Sequence

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._errors import nearest
from .module_paths import last_name, lies_in

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


def check_rank(r: int) -> None:
    """Raise if ``r`` is not a rank."""
    if not isinstance(r, numbers.Integral) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r={r!r}: the rank must be a positive integer.")


def ranks_of(module: nn.Module, names: Sequence[str], r: int, *, cut_rank: bool = False) -> list[int]:
    """Return the rank of each layer: ``r``, or the largest one that the layer allows.

    Args:
        module: Module that contains the layers.
        names: Paths of the layers.
        r: Wanted rank.
        cut_rank: Whether a layer that does not allow ``r`` gets the largest rank that it allows.

    Raises:
        ValueError: A layer does not allow ``r``, and ``cut_rank`` is False.
    """
    check_rank(r)
    largest = [min(shape_of(module.get_submodule(name))) for name in names]
    small = [(name, limit) for name, limit in zip(names, largest, strict=True) if limit < r]
    if small and not cut_rank:
        name = small[0][0]
        shape = shape_of(module.get_submodule(name))
        excluded = sorted({last_name(name) for name, _ in small})
        raise ValueError(
            f"r={r} is larger than layer {name!r} with weight {shape[0]} x {shape[1]} (out x in) allows: use "
            f"r <= {min(limit for _, limit in small)}, or leave the layer out of target_modules. To keep r for the "
            f"other layers, pass cut_rank=True, or exclude_modules={excluded}."
        )
    return [min(r, limit) for limit in largest]


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
        if not name or name not in names:
            raise ValueError(f"modules_to_save: the module has no {name!r}. {nearest(name, [n for n in names if n])}")
        if next(names[name].parameters(), None) is None:
            raise ValueError(f"modules_to_save: {name!r} has no parameters to train. Leave it out.")
        if around := [other for other in heads if other != name and lies_in(name, other)]:
            raise ValueError(f"modules_to_save: {name!r} is a part of {around[0]!r}, which contains it: leave it out.")
