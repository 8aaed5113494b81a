"""Activations and NVFP4 weights rounded to FP8 (E4M3). Reference and definitions: ``kernels/nvfp4_fp8_linear.py``.

For ``benchmarks/bench_fp8.py``; no layer computes in FP8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .nvfp4_format import E2M1_FACTOR, INTERPRETED, e2m1_high_to_float32, e2m1_low_to_float32, e4m3_to_float32
from .nvfp4_quantize import float32_to_e4m3, to_float32

BLOCK_K = 16384
"""Columns of a row that a program reads at once."""

BLOCK_N = 32
BLOCK_GROUPS = 8
WARPS = 4
SCALE_ROWS = 4
"""Rows of the block scales that a program reduces."""


@triton.jit
def power_of_two(amax):
    """``row_scales`` of the reference for finite values: the biased exponent of the power of two, in int32."""
    bits = amax.to(tl.int32, bitcast=True)
    return tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)


@triton.jit
def to_e4m3(value, NATIVE: tl.constexpr):
    """E4M3 bytes (uint8) of float32 values within +-448, ties to even. NaN stays NaN where NATIVE, on GPUs with FP8."""
    if NATIVE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        sign = (value.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (float32_to_e4m3(tl.abs(value)).to(tl.uint32) | sign).to(tl.uint8)


@triton.jit(do_not_specialize=["factor"])
def fp8_quantize_rows_kernel(x, out, scale, k, stride, factor, BLOCK_K: tl.constexpr, NATIVE: tl.constexpr):
    """One program rounds one row; ``scale`` gets its power of two times ``factor``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    amax = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for begin in range(0, k, BLOCK_K):
        inside = begin + column < k
        amax = tl.maximum(amax, tl.abs(to_float32(tl.load(x + row * stride + begin + column, mask=inside, other=0.0))))
    largest = tl.max(amax, axis=0)
    exponent = power_of_two(largest)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for begin in range(0, k, BLOCK_K):
        inside = begin + column < k
        value = to_float32(tl.load(x + row * stride + begin + column, mask=inside, other=0.0)) * inverse
        tl.store(out + row * k + begin + column, to_e4m3(value, NATIVE), mask=inside)
    power = (exponent << 23).to(tl.float32, bitcast=True) * factor
    tl.store(scale + row, tl.where(largest < float("inf"), power, float("nan")))


@triton.jit
def nvfp4_channel_scale_kernel(block_scale, out, n, groups, BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """One program finds the powers of two of BLOCK_N output channels."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    largest = tl.zeros((BLOCK_N, BLOCK_GROUPS), dtype=tl.int32)
    for begin in range(0, groups, BLOCK_GROUPS):
        inside = (row < n)[:, None] & (begin + group < groups)[None, :]
        byte = tl.load(block_scale + row[:, None] * groups + begin + group[None, :], mask=inside, other=0)
        largest = tl.maximum(largest, byte.to(tl.int32) & 0x7F)  # magnitudes are in the order of their bytes
    amax = e4m3_to_float32(tl.max(largest, axis=1).to(tl.uint8)) * 6.0
    tl.store(out + row, (power_of_two(amax) << 23).to(tl.float32, bitcast=True), mask=row < n)


@triton.jit
def nvfp4_to_fp8_kernel(
    packed, block_scale, channel_scale, out, n, half_k, groups,
    BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program rounds BLOCK_N rows of BLOCK_GROUPS groups of 16 columns.

    ``out`` takes E4M3 bytes (uint8), or the rounded weight itself (bfloat16).
    """
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    inside = (row < n)[:, None] & (group < groups)[None, :]
    channel = tl.load(channel_scale + row, mask=row < n, other=1.0)
    inverse = ((254 << 23) - channel.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    s = e4m3_to_float32(tl.load(block_scale + row[:, None] * groups + group[None, :], mask=inside, other=0))
    s = (s * E2M1_FACTOR * inverse[:, None])[:, :, None]
    pair = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    byte = tl.load(packed + row[:, None, None] * half_k + pair, mask=inside[:, :, None], other=0)
    low = to_e4m3(e2m1_low_to_float32(byte) * s, NATIVE)
    high = to_e4m3(e2m1_high_to_float32(byte) * s, NATIVE)
    codes = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_GROUPS * 16))
    column = tl.program_id(1) * (BLOCK_GROUPS * 16) + tl.arange(0, BLOCK_GROUPS * 16)
    inside_w = (row < n)[:, None] & (column < 2 * half_k)[None, :]
    if out.dtype.element_ty == tl.uint8:
        tl.store(out + row[:, None] * (2 * half_k) + column[None, :], codes, mask=inside_w)
    else:
        values = e4m3_to_float32(codes) * channel[:, None]
        tl.store(out + row[:, None] * (2 * half_k) + column[None, :], values.to(out.dtype.element_ty), mask=inside_w)


def quantize_rows(x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """For arguments and results see :func:`qerl_verl.kernels.portable.fp8_quantize`; ``x`` is ``[M, K]``."""
    m, k = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(m, k, dtype=torch.uint8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        block = min(BLOCK_K, max(64, triton.next_power_of_2(k)))
        fp8_quantize_rows_kernel[(m,)](
            x, out, scale, k, x.stride(0), factor, BLOCK_K=block, NATIVE=not INTERPRETED,
            num_warps=max(4, min(16, block // 1024)),
        )  # fmt: skip
    return out.view(torch.float8_e4m3fn), scale


def channel_scales(block_scale: torch.Tensor) -> torch.Tensor:
    """``[N]`` float32, the powers of two of an NVFP4 weight's output channels, from its scale bytes ``[N, K / 16]``."""
    n, groups = block_scale.shape
    out = torch.empty(n, dtype=torch.float32, device=block_scale.device)
    nvfp4_channel_scale_kernel[(triton.cdiv(n, SCALE_ROWS),)](
        block_scale, out, n, groups, BLOCK_N=SCALE_ROWS, BLOCK_GROUPS=min(512, triton.next_power_of_2(groups))
    )
    return out


def nvfp4_to_fp8(
    packed: torch.Tensor, block_scale: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded weight ``[N, K]``, as E4M3 codes or in bfloat16, and the powers of two ``[N]`` of its codes.

    Args:
        packed: ``[N, K / 2]`` uint8.
        block_scale: ``[N, K / 16]`` uint8.
        dtype: float8_e4m3fn or bfloat16.
    """
    n, half_k = packed.shape
    packed, block_scale = packed.contiguous(), block_scale.contiguous()
    channel, groups = channel_scales(block_scale), block_scale.shape[1]
    codes = dtype == torch.float8_e4m3fn
    out = torch.empty(n, half_k * 2, dtype=torch.uint8 if codes else dtype, device=packed.device)
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(groups, BLOCK_GROUPS))
    nvfp4_to_fp8_kernel[grid](
        packed, block_scale, channel, out, n, half_k, groups,
        BLOCK_N=BLOCK_N, BLOCK_GROUPS=BLOCK_GROUPS, NATIVE=not INTERPRETED, num_warps=WARPS,
    )  # fmt: skip
    return (out.view(torch.float8_e4m3fn) if codes else out), channel
