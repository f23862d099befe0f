"""Rows of a matrix in 8-bit floats: each row has a scale, and its largest number becomes the largest 8-bit number.

For a row v, ``scale = max |v| / 448`` in float32, and ``codes = round(v * (1 / scale))`` in float8_e4m3fn. Its numbers
have four significant bits and reach 448. The relative error of a code is at most 2^-4.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

#: Type of the codes.
FLOAT8 = torch.float8_e4m3fn
#: One over the largest number of this type. A product rounds alike on all devices; a division by 448 does not.
INVERSE = 1 / 448
#: Largest numbers of rows below this one are taken for it, so that rows of zeros have a scale.
SMALLEST = 2.0**-100
#: Rows that are converted at one time where the intermediate results take memory.
ROWS_AT_ONCE = 1024


def quantize_rows(matrix: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convert each row of a matrix to 8-bit floats with a scale of its own.

    On a CUDA device with Triton, one kernel does it. Elsewhere torch does it, with the same bits as result.

    Args:
        matrix: Numbers, (M, K).
        columns: Factor of each column, (K,) in float32, by which the matrix is multiplied first; None means 1.

    Returns:
        Codes, (M, K) in float8_e4m3fn, and scales, (M, 1) in float32.

    Example:
        >>> codes, scales = quantize_rows(torch.tensor([[448.0, -1.0], [0.0, 0.0]]))
        >>> (codes.float() * scales).tolist()
        [[448.0, -1.0], [0.0, 0.0]]
    """
    kernels = triton_kernels() if matrix.is_cuda and len(matrix) else None
    return quantize_rows_plainly(matrix, columns) if kernels is None else kernels.quantize_rows(matrix, columns)


def quantize_rows_plainly(matrix: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convert rows as :func:`quantize_rows`, with functions of torch alone."""
    values = matrix.float()
    if columns is not None:
        values = values * columns
    scales = values.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) * INVERSE
    return (values * (1 / scales)).to(FLOAT8), scales


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a weight as :func:`quantize_rows`, some rows at a time, so that float32 copies stay small."""
    parts = [quantize_rows(part) for part in weight.split(ROWS_AT_ONCE)]
    codes, scales = (torch.cat([part.view(kind) for part in column]) for column, kind in _columns(parts))
    return codes.view(FLOAT8), scales


def _columns(parts: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], torch.dtype]]:
    """Return codes and scales of all parts, with types that torch can concatenate on every device."""
    return [([codes for codes, _ in parts], torch.uint8), ([scales for _, scales in parts], torch.float32)]


def transpose(codes: Tensor) -> Tensor:
    """Return codes (N, K) as a matrix (K, N) that is contiguous in memory; its type is uint8."""
    kernels = triton_kernels() if codes.is_cuda else None
    bits = codes.view(torch.uint8)
    return bits.t().contiguous() if kernels is None else kernels.transpose(bits)


@functools.cache
def triton_kernels() -> Any:
    """Return the module of Triton kernels; None where Triton is not installed, as on Windows."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import float8_kernels

    return float8_kernels
