"""The input of a layer in 8-bit floats, converted once for all layers that read the same tensor one after the other.

The query, key and value projections of a block read one tensor, and so do the gate and the up projection of its MLP.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .float8_rows import quantize_rows


class _Converted(NamedTuple):
    source: weakref.ref[Tensor]
    version: int
    codes: Tensor
    scales: Tensor


#: The last input, for as long as it lives. Threads may share it, because an entry is replaced as a whole.
_LAST: list[_Converted] = []


def quantize_input(x: Tensor) -> tuple[Tensor, Tensor]:
    """Convert the rows of an input, unless the call before converted the same tensor.

    Args:
        x: Activations, (..., K), not changed in place since the call before.

    Returns:
        Codes, (rows, K) in float8_e4m3fn, and scales, (rows, 1) in float32.
    """
    if x.is_inference():  # such tensors do not count their changes
        return _convert(x)
    last = _LAST[0] if _LAST else None
    if last is not None and last.source() is x and last.version == x._version:
        return last.codes, last.scales
    codes, scales = _convert(x)
    _LAST[:] = [_Converted(weakref.ref(x, _forget), x._version, codes, scales)]
    return codes, scales


@torch.no_grad()
def _convert(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(x.reshape(-1, x.shape[-1]))


def _forget(source: weakref.ref[Tensor]) -> None:
    """Free the codes of an input that no longer exists."""
    if _LAST and _LAST[0].source is source:
        _LAST.clear()
