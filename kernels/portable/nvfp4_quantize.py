"""Quantize a weight to NVFP4, bit for bit as the reference ``kernels/nvfp4_quantize.py`` does.

All roundings are to nearest, ties to even. Divisions are the IEEE ones (``div_rn``), as PyTorch's are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE

from .nvfp4_format import e4m3_to_float32

BLOCKS = 128
WARPS = 4
ZERO_BLOCK_SCALE_BYTE = tl.constexpr(0x20)
"""0.125 in E4M3: the scale of a block whose own scale rounds to zero."""


@triton.jit
def float32_to_e4m3(value):
    """The E4M3 byte nearest to float32 values in [0, 448], ties to even, in int32."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960: the biases, (127 - 7) << 3
    # Below 2**-6 the step is 2**-9, which is that of float32 numbers at 2**14: the addition rounds.
    subnormal = (value + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def float32_to_e2m1(value):
    """The E2M1 code nearest to float32 values, ties to even, in uint8. Each comparison is one midpoint of two codes."""
    a = tl.abs(value)
    code = (a > 0.25).to(tl.uint8) + (a >= 0.75).to(tl.uint8) + (a > 1.25).to(tl.uint8) + (a >= 1.75).to(tl.uint8)
    code += (a > 2.5).to(tl.uint8) + (a >= 3.5).to(tl.uint8) + (a > 5.0).to(tl.uint8)
    return code | ((value < 0).to(tl.uint8) << 3)


@triton.jit
def to_float32(value):
    """Exactly. bfloat16 by its bits: the interpreter's cast gets subnormal numbers wrong."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """float32 values >= 0 rounded to ``dtype``, in float32. bfloat16 by its bits: the interpreter's cast truncates."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        return value.to(tl.float16).to(tl.float32)
    else:
        return value


@triton.jit
def nvfp4_quantize_kernel(weight, global_scale, packed, scale, count, BLOCKS: tl.constexpr):
    """One program quantizes BLOCKS blocks of 16 consecutive weights."""
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    inside = (block < count)[:, None]
    w = to_float32(tl.load(weight + block[:, None] * 16 + tl.arange(0, 16)[None, :], mask=inside, other=0.0))
    divisor = tl.load(global_scale)
    sixth = tl.div_rn(tl.max(tl.abs(w), axis=1), tl.full((BLOCKS,), 6.0, tl.float32))
    block_scale = tl.minimum(round_to(sixth, weight.dtype.element_ty) * divisor, 448.0)
    byte = float32_to_e4m3(block_scale)
    byte = tl.where(byte == 0, ZERO_BLOCK_SCALE_BYTE, byte).to(tl.uint8)
    tl.store(scale + block, byte, mask=block < count)
    step = tl.div_rn(e4m3_to_float32(byte), tl.broadcast_to(divisor, (BLOCKS,)))
    code = float32_to_e2m1(tl.div_rn(w, tl.broadcast_to(step[:, None], (BLOCKS, 16))))
    even, odd = tl.split(tl.reshape(code, (BLOCKS, 8, 2)))
    tl.store(packed + block[:, None] * 8 + tl.arange(0, 8)[None, :], even | (odd << 4), mask=inside)


def nvfp4_quantize(weight: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For arguments and results see :func:`qerl_verl.kernels.portable.quantize`."""
    n, k = weight.shape
    weight = weight.contiguous()
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, k // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    count = scale.numel()
    if count:
        nvfp4_quantize_kernel[(triton.cdiv(count, BLOCKS),)](
            weight, global_scale, packed, scale.view(torch.uint8), count, BLOCKS=BLOCKS, num_warps=WARPS
        )
    return packed, scale
