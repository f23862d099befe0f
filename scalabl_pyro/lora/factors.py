"""Access to the factors (A, B) of LoRA layers, and functions that process all factors of one shape in one call."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from .float8 import Float8Linear

Factors = tuple[tuple[Tensor, Tensor], ...]
"""(A, B) of each layer, in the order of the subspace."""


def factors_of(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the parameters A (r, in) and B (out, r) of a PEFT layer."""
    return cast(nn.Linear, layer.lora_A[adapter_name]).weight, cast(nn.Linear, layer.lora_B[adapter_name]).weight


def local_part(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this process holds: the whole one, unless it is split over processes."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def compute_dtype(layer: LoraLayer, A: Tensor) -> torch.dtype:
    """Return the dtype of the base weight, or that of A if the base layer is quantized by another library.

    A quantized layer has no dtype to compute with. The forward pass casts the factors to the dtype of its input.
    """
    base = layer.get_base_layer()
    if isinstance(base, Float8Linear):
        return base.dtype
    dtype = getattr(getattr(base, "weight", None), "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64) else A.dtype


def cast_stacked(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Cast each tensor to its own dtype, with one call for all tensors of one shape."""
    out = list(tensors)
    for dtype in set(dtypes):
        todo = [i for i, t in enumerate(tensors) if dtypes[i] == dtype and t.dtype != dtype]
        cast_all = map_stacked(operator.methodcaller("to", dtype), [tensors[i] for i in todo])
        for i, t in zip(todo, cast_all, strict=True):
            out[i] = t
    return out


def map_stacked(fn: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Compute ``[fn(t) for t in tensors]`` with one call for all tensors of one shape, dtype and device.

    With one call per tensor, the small kernels take longer to launch than to run.

    Args:
        fn: Function that treats the first dimension of its argument as a batch.
        tensors: Tensors of any shapes.

    Returns:
        Results in the order of ``tensors``.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, t in enumerate(tensors):
        groups.setdefault((t.shape, t.dtype, t.device), []).append(i)
    out: list[Tensor] = list(tensors)
    for members in groups.values():
        for i, value in zip(members, fn(torch.stack([tensors[i] for i in members])).unbind(0), strict=True):
            out[i] = value
    return out
