"""Decodes NVFP4 weights to ``e2m1 * scale`` in bfloat16 or float16.

The reference is ``block_values_nvfp4`` of ``kernels/nvfp4_dequantize.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.triton.nvfp4_format import (
    E2M1_FACTOR,
    e2m1_high_to_float32,
    e2m1_low_to_float32,
    e4m3_to_float32,
)

BLOCK_N = 32
BLOCK_GROUPS = 8
WARPS = 4


@triton.jit
def nvfp4_block_values_kernel(
    packed, scale, out, n, half_k, groups, factor,
    BLOCK_N: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
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
    # [rows, groups, 8, 2]
    values = tl.join(e2m1_low_to_float32(byte) * s, e2m1_high_to_float32(byte) * s)
    values = tl.reshape(values, (BLOCK_N, BLOCK_GROUPS * 16)).to(out.dtype.element_ty)  # exact
    column = tl.program_id(1) * (BLOCK_GROUPS * 16) + tl.arange(0, BLOCK_GROUPS * 16)
    inside_w = (row < n)[:, None] & (column < 2 * half_k)[None, :]
    tl.store(out + row[:, None] * (2 * half_k) + column[None, :], values, mask=inside_w)


def nvfp4_block_values(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, factor: float = 1.0
) -> torch.Tensor:
    """Returns ``factor * e2m1 * scale``; arguments and results are those of
    :func:`qerl_verl.kernels.triton.block_values`.

    ``factor`` is a power of two for which ``dtype`` still holds the values exactly.
    """
    n, half_k = packed.shape
    packed, scale = packed.contiguous(), scale.view(torch.uint8).contiguous()
    groups = half_k * 2 // BLOCK_SIZE
    out = torch.empty(n, half_k * 2, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(groups, BLOCK_GROUPS))
    nvfp4_block_values_kernel[grid](
        packed, scale, out, n, half_k, groups, factor,
        BLOCK_N=BLOCK_N, BLOCK_GROUPS=BLOCK_GROUPS, num_warps=WARPS,
    )  # fmt: skip
    return out
