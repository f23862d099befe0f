"""Triton kernels for 8-bit floats: conversion of rows in one pass, and transposition. Imported on CUDA devices only.

torch alone needs several kernels for a conversion, each of which reads or writes the whole matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Longest row that a program of the conversion keeps in registers. It reads longer ones twice.
WIDEST = 32768
#: Rows and columns of the tiles that are transposed.
TILE = 128


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]  # Triton reads annotations
    matrix, columns, codes, scales, width, stride, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(matrix + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        values = values * tl.load(columns + at, mask=at < width, other=0.0)
    # 2^-100 and 1 / 448, as in float8_rows.
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 7.888609052210118e-31) * 0.002232142857142857
    tl.store(scales + row, scale)
    tl.store(codes + row * width + at, (values * tl.div_rn(1.0, scale)).to(tl.float8e4nv), mask=at < width)


@triton.jit
def _quantize_long(  # type: ignore[no-untyped-def]
    matrix, columns, codes, scales, width, stride, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(matrix + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
        if HAS_COLUMNS:
            values = values * tl.load(columns + at, mask=at < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(values))
    scale = tl.maximum(tl.max(largest, axis=0), 7.888609052210118e-31) * 0.002232142857142857
    tl.store(scales + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(matrix + row * stride + at, mask=at < width, other=0.0).to(tl.float32)
        if HAS_COLUMNS:
            values = values * tl.load(columns + at, mask=at < width, other=0.0)
        tl.store(codes + row * width + at, (values * inverse).to(tl.float8e4nv), mask=at < width)


@triton.jit
def _transpose(source, target, height, width, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    tile = tl.load(source + rows[:, None] * width + columns[None, :], mask=inside, other=0)
    tl.store(target + columns[:, None] * height + rows[None, :], tl.trans(tile), mask=tl.trans(inside))


def quantize_rows(matrix: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Convert rows as :func:`scalabl_pyro.lora.float8_rows.quantize_rows`, with one kernel."""
    height, width = matrix.shape
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    codes = torch.empty((height, width), dtype=torch.float8_e4m3fn, device=matrix.device)
    scales = torch.empty((height, 1), dtype=torch.float32, device=matrix.device)
    block = triton.next_power_of_2(width)
    kernel = _quantize if block <= WIDEST else _quantize_long
    with torch.cuda.device(matrix.device):
        kernel[(height,)](
            matrix,
            scales if columns is None else columns,  # an address that is not read
            codes,
            scales,
            width,
            matrix.stride(0),
            HAS_COLUMNS=columns is not None,
            BLOCK=block if block <= WIDEST else 4096,
            num_warps=min(max(block // 1024, 4), 16),
        )
    return codes, scales


def transpose(bits: Tensor) -> Tensor:
    """Return a contiguous matrix of bytes (N, K) as a contiguous matrix (K, N)."""
    height, width = bits.shape
    target = torch.empty((width, height), dtype=bits.dtype, device=bits.device)
    grid = (triton.cdiv(height, TILE), triton.cdiv(width, TILE))
    with torch.cuda.device(bits.device):
        _transpose[grid](bits, target, height, width, TILE=TILE, num_warps=8)
    return target
