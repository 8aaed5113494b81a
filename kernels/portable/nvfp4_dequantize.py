"""Unpack NVFP4 weights to bfloat16 or float16, row-major or transposed. Reference: ``kernels/nvfp4_dequantize.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE

from .nvfp4_format import E2M1_FACTOR, e2m1_high_to_float32, e2m1_low_to_float32, e4m3_to_float32

BLOCK_N = 32
BLOCK_GROUPS = 8
WARPS = 4


@triton.jit
def nvfp4_dequantize_kernel(
    packed, scale, out, n, half_k, groups, stride_n, stride_k, factor,
    BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One program unpacks BLOCK_N rows of BLOCK_GROUPS groups of 16 columns."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    row = row.to(tl.int64)
    inside = (row < n)[:, None] & (group < groups)[None, :]
    s = e4m3_to_float32(tl.load(scale + row[:, None] * groups + group[None, :], mask=inside, other=0)) * factor
    s = (s * E2M1_FACTOR)[:, :, None]
    pair = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    byte = tl.load(packed + row[:, None, None] * half_k + pair, mask=inside[:, :, None], other=0)
    values = tl.join(e2m1_low_to_float32(byte) * s, e2m1_high_to_float32(byte) * s)  # [rows, groups, 8, 2]
    values = tl.reshape(values, (BLOCK_N, BLOCK_GROUPS * 16)).to(out.dtype.element_ty)  # exact
    column = tl.program_id(1) * (BLOCK_GROUPS * 16) + tl.arange(0, BLOCK_GROUPS * 16)
    if TRANSPOSED:
        inside_t = (column < 2 * half_k)[:, None] & (row < n)[None, :]
        tl.store(out + column.to(tl.int64)[:, None] * stride_k + row[None, :], tl.trans(values), mask=inside_t)
    else:
        inside_w = (row < n)[:, None] & (column < 2 * half_k)[None, :]
        tl.store(out + row[:, None] * stride_n + column[None, :], values, mask=inside_w)


def nvfp4_dequantize(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, transposed: bool = False, factor: float = 1.0
) -> torch.Tensor:
    """``factor * e2m1 * scale``. For arguments and results see :func:`qerl_verl.kernels.portable.dequantize`.

    ``factor`` is a power of two for which ``dtype`` still holds the values exactly.
    """
    n, half_k = packed.shape
    packed, scale = packed.contiguous(), scale.view(torch.uint8).contiguous()
    groups = half_k * 2 // BLOCK_SIZE
    shape = (half_k * 2, n) if transposed else (n, half_k * 2)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(groups, BLOCK_GROUPS))
    nvfp4_dequantize_kernel[grid](
        packed, scale, out, n, half_k, groups, half_k * 2, n, factor,
        BLOCK_N=BLOCK_N, BLOCK_GROUPS=BLOCK_GROUPS, TRANSPOSED=transposed, num_warps=WARPS,
    )  # fmt: skip
    return out
