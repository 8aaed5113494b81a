"""Computes ``y = inverse_scale * x (e2m1 * scale)^T + bias + u lora_b^T`` with an NVFP4 weight.

inverse_scale is 1 / global_scale. The reference is ``kernels/nvfp4_linear.py``.

The weight is decoded in registers without rounding: ``e2m1 * scale`` is exact in bfloat16 and
float16. A byte holds two neighbouring input channels. The kernel multiplies the even and the odd
columns of a tile separately, so that it need not interleave them. The accumulator is float32, with
an output channel in each row and a token in each column: the weight is the first operand, and the
tokens, of which there are few, are the second.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.triton import tuning
from qerl_verl.kernels.triton.nvfp4_block_values import nvfp4_block_values
from qerl_verl.kernels.triton.nvfp4_format import (
    E2M1_FACTOR,
    INTERPRETED,
    e2m1_high_to_float32,
    e2m1_low_to_float32,
    e4m3_to_float32,
)

REDUCE_BLOCK = 1024
FLOAT16_FACTOR = 2.0**-12
"""Multiplies the decoded weight of a float16 GEMM, exactly, and divides inverse_scale. cuBLAS may
add partial sums in float16, where ``e2m1 * scale`` (up to 2688) would overflow."""


@triton.jit(do_not_specialize=["m", "steps"])
def nvfp4_gemm_kernel(
    x, packed, scale, bias, u, lora_b, out, inverse_scale, m, n, k, k_64, rank, steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_N output channels of BLOCK_M tokens from ``steps`` steps of BLOCK_K
    input channels.

    ``out`` is y [m, n], or a float32 workspace [parts, m, n] where K is divided; the first part
    then adds the LoRA delta, and the bias is left to the sum of the parts. DOT is the dtype of the
    operands of tl.dot. One compiled kernel serves every number of tokens and of parts.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    tile_m = tl.program_id(0) % tiles_m  # neighbours share weights
    part = tl.program_id(1)
    token = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    channel = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    # Rows beyond the end read the last one and are never stored, which needs no masks in the loop.
    token_row = tl.minimum(token, m - 1)
    channel_row = tl.minimum(channel, n - 1)

    # Computed from K / 64, so that the compiler knows them to be multiples of 32 and 4, and copies
    # words, not bytes.
    half_k, groups = k_64 * 32, k_64 * 4
    group = tl.arange(0, BLOCK_K // 16)
    pair = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    first = part * steps
    last = tl.minimum(first + steps, k // BLOCK_K)
    x_at = x + token_row[:, None] * k + tl.arange(0, BLOCK_K)[None, :] + first * BLOCK_K
    packed_at = packed + channel_row[:, None, None] * half_k + pair + first * (BLOCK_K // 2)
    scale_at = scale + channel_row[:, None] * groups + group[None, :] + first * (BLOCK_K // 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for _ in range(first, last):
        x_even, x_odd = tl.split(tl.reshape(tl.load(x_at), (BLOCK_M, BLOCK_K // 2, 2)))
        byte = tl.load(packed_at)
        s = (e4m3_to_float32(tl.load(scale_at)) * E2M1_FACTOR)[:, :, None]
        w_even = tl.reshape((e2m1_low_to_float32(byte) * s).to(DOT), (BLOCK_N, BLOCK_K // 2))
        w_odd = tl.reshape((e2m1_high_to_float32(byte) * s).to(DOT), (BLOCK_N, BLOCK_K // 2))
        acc = tl.dot(w_even, tl.trans(x_even.to(DOT)), acc)
        acc = tl.dot(w_odd, tl.trans(x_odd.to(DOT)), acc)
        x_at += BLOCK_K
        packed_at += BLOCK_K // 2
        scale_at += BLOCK_K // 16
    acc = acc * inverse_scale

    if u is not None:
        if part == 0:
            column = tl.arange(0, BLOCK_R)
            u_at = u + token_row[:, None] * rank + column[None, :]
            b_at = lora_b + channel_row[:, None] * rank + column[None, :]
            for _ in range(0, rank, BLOCK_R):
                acc = tl.dot(tl.load(b_at).to(DOT), tl.trans(tl.load(u_at).to(DOT)), acc)
                u_at += BLOCK_R
                b_at += BLOCK_R
    if bias is not None:
        acc += tl.load(bias + channel_row).to(tl.float32)[:, None]

    at = out + (part.to(tl.int64) * m + token)[None, :] * n + channel[:, None]
    inside = (channel < n)[:, None] & (token < m)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def nvfp4_gemm_reduce_kernel(parts, bias, out, n, count, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Computes ``out = parts[0] + ... + parts[SPLIT - 1] + bias``, in this order; ``count``
    elements each.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    acc = tl.load(parts + index, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT):
        acc += tl.load(parts + index + part * count, mask=inside, other=0.0)
    if bias is not None:
        acc += tl.load(bias + index % n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=inside)


def run_plan(x, weight: PackedWeight, bias, u, lora_b, plan: tuning.Plan) -> torch.Tensor:
    """Returns the GEMM with an explicit plan. ``x`` is ``[M, K]``, ``u`` is ``[M, R]`` or None, all
    tensors are contiguous, and the weight's scales are uint8."""
    packed, scale, inverse_scale = weight.packed, weight.scale, 1.0 / weight.global_scale
    m, k = x.shape
    n = packed.shape[0]
    if plan.path == "decode first":
        factor = FLOAT16_FACTOR if x.dtype == torch.float16 else 1.0
        values = nvfp4_block_values(packed, scale, x.dtype, factor=factor).t()
        start = x.new_empty(n) if bias is None else bias
        y = torch.addmm(start, x, values, beta=0 if bias is None else 1, alpha=inverse_scale / factor)
        return y if u is None else y.addmm_(u, lora_b.t())

    # The interpreter has no bfloat16 arithmetic and its cast to bfloat16 truncates: float32 there.
    emulated = INTERPRETED and x.dtype == torch.bfloat16
    dot = tl.float32 if emulated else tl.float16 if x.dtype == torch.float16 else tl.bfloat16
    y = torch.empty(m, n, dtype=torch.float32 if emulated else x.dtype, device=x.device)
    split = plan.split_k
    parts = torch.empty(split, m, n, dtype=torch.float32, device=x.device) if split > 1 else y
    rank = 0 if u is None else u.shape[1]
    grid = (triton.cdiv(m, plan.block_m) * triton.cdiv(n, plan.block_n), split)
    nvfp4_gemm_kernel[grid](
        x, packed, scale, None if split > 1 else bias, u, lora_b, parts, inverse_scale, m, n, k, k // 64, rank,
        triton.cdiv(k // plan.block_k, split),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, BLOCK_R=16 if rank % 32 else 32,
        DOT=dot, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if split > 1:
        nvfp4_gemm_reduce_kernel[(triton.cdiv(m * n, REDUCE_BLOCK),)](
            parts, bias, y, n, m * n, SPLIT=split, BLOCK=REDUCE_BLOCK, num_warps=4
        )
    return y.to(x.dtype)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return tuning.MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous tensor on a 16-byte boundary, so that views use the same compiled kernel
    and wide loads.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def nvfp4_gemm(x, weight: PackedWeight, bias=None, u=None, lora_b=None) -> torch.Tensor:
    """Takes the arguments and returns the results of :func:`qerl_verl.kernels.triton.gemm`."""
    n, k = weight.packed.shape[0], weight.packed.shape[1] * 2
    rows = _aligned(x.reshape(-1, k))
    m = rows.shape[0]
    if m == 0 or n == 0:
        return x.new_empty((*x.shape[:-1], n))
    if u is not None:
        u, lora_b = _aligned(u.reshape(m, -1)), _aligned(lora_b)
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    plan = tuning.choose(m, n, k, _multiprocessors(x.device))
    packed, scale = _aligned(weight.packed), _aligned(weight.scale.view(torch.uint8))
    y = run_plan(rows, PackedWeight(packed, scale, weight.global_scale), bias, u, lora_b, plan)
    return y.view(*x.shape[:-1], n)
