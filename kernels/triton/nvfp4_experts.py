"""The experts of a mixture with NVFP4 weights. Reference: ``kernels/nvfp4_experts.py``.

Four launches, none of which depends on a value that the host would have to read, so a CUDA graph
can hold them:

1. the choices ``[T, k]`` are sorted by expert;
2. gate and up of every choice, and their gated product;
3. down, times the weight of the choice;
4. the sum over the choices of each token.

The second and third are grouped GEMMs. A program makes BLOCK_N output channels of BLOCK_M rows of
one expert; the grid has room for all tokens in each expert, and a program without rows ends at
once. No sum depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qerl_verl.kernels.nvfp4_experts import ExpertStack
from qerl_verl.kernels.triton.nvfp4_format import (
    E2M1_FACTOR,
    INTERPRETED,
    e2m1_high_to_float32,
    e2m1_low_to_float32,
    e4m3_to_float32,
)

SORT_BLOCK = 1024
SUM_BLOCK = 512
# (rows of an expert up to, BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), rows on average
TILES = (
    (16, 16, 32, 128, 4, 3),
    (32, 32, 64, 64, 4, 3),
    (None, 64, 64, 64, 4, 3),
)
"""What is launched. Small enough for the shared memory of every GPU that Triton serves."""


@triton.jit(do_not_specialize=["count"])
def sort_choices_kernel(chosen, order, bounds, count, BLOCK: tl.constexpr):
    """Program e writes the places of expert e in ``chosen`` [count], ascending, to ``order``, and
    where they begin and end there to ``bounds`` [E, 2].

    Negative experts come first and belong to no program, so their part of ``order`` stays empty.
    """
    expert = tl.program_id(0)
    below = tl.zeros((BLOCK,), dtype=tl.int32)
    equal = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        found = tl.load(chosen + place, mask=place < count, other=1 << 30)
        below += (found < expert).to(tl.int32)
        equal += (found == expert).to(tl.int32)
    begin = tl.sum(below, 0)
    tl.store(bounds + 2 * expert, begin)
    tl.store(bounds + 2 * expert + 1, begin + tl.sum(equal, 0))
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        found = tl.load(chosen + place, mask=place < count, other=1 << 30)
        hit = (found == expert).to(tl.int32)
        tl.store(order + begin + tl.cumsum(hit, 0) - 1, place, mask=hit != 0)
        begin += tl.sum(hit, 0)


@triton.jit
def _decode(packed_at, scale_at, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The even and the odd columns of a tile of ``e2m1 * scale``, ``[BLOCK_N, BLOCK_K / 2]`` each."""
    byte = tl.load(packed_at)
    s = (e4m3_to_float32(tl.load(scale_at)) * E2M1_FACTOR)[:, :, None]
    even = tl.reshape((e2m1_low_to_float32(byte) * s).to(DOT), (BLOCK_N, BLOCK_K // 2))
    odd = tl.reshape((e2m1_high_to_float32(byte) * s).to(DOT), (BLOCK_N, BLOCK_K // 2))
    return even, odd


@triton.jit(do_not_specialize=["top_k"])
def grouped_gemm_kernel(
    x, packed, scale, alpha, order, bounds, weights, out, n, k_64, top_k,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """``out`` [S, n] of the rows of one expert.

    GATED: row r of the sorted choices is token ``order[r] // top_k`` of ``x``, the weight has 2 n
    rows, and what is stored at r is silu(gate) * up. Otherwise row r of ``x`` is r's, and alpha and
    weights times the output is stored at ``order[r]``.
    """
    channel = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    expert = tl.program_id(1)
    begin, end = tl.load(bounds + 2 * expert), tl.load(bounds + 2 * expert + 1)
    first = begin + tl.program_id(2) * BLOCK_M
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        # Rows and channels beyond the end read the last one and are never stored.
        place = tl.load(order + tl.minimum(row, end - 1)).to(tl.int64)
        source = place // top_k if GATED else tl.minimum(row, end - 1).to(tl.int64)
        channel_row = tl.minimum(channel, n - 1)
        # Computed from K / 64, so that the compiler knows them to be multiples of 32 and 4.
        k, half_k, groups = k_64 * 64, k_64 * 32, k_64 * 4
        rows_of_expert = 2 * n if GATED else n
        weight_row = expert.to(tl.int64) * rows_of_expert + channel_row
        group = tl.arange(0, BLOCK_K // 16)
        pair = group[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        x_at = x + source[:, None] * k + tl.arange(0, BLOCK_K)[None, :]
        packed_at = packed + weight_row[:, None, None] * half_k + pair
        scale_at = scale + weight_row[:, None] * groups + group[None, :]
        up_packed, up_scale = n.to(tl.int64) * half_k, n.to(tl.int64) * groups
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for _ in range(0, k_64 * 64 // BLOCK_K):
            x_even, x_odd = tl.split(tl.reshape(tl.load(x_at), (BLOCK_M, BLOCK_K // 2, 2)))
            x_even, x_odd = tl.trans(x_even.to(DOT)), tl.trans(x_odd.to(DOT))
            w_even, w_odd = _decode(packed_at, scale_at, DOT, BLOCK_N, BLOCK_K)
            acc = tl.dot(w_even, x_even, acc)
            acc = tl.dot(w_odd, x_odd, acc)
            if GATED:
                w_even, w_odd = _decode(packed_at + up_packed, scale_at + up_scale, DOT, BLOCK_N, BLOCK_K)
                up = tl.dot(w_even, x_even, up)
                up = tl.dot(w_odd, x_odd, up)
            x_at += BLOCK_K
            packed_at += BLOCK_K // 2
            scale_at += BLOCK_K // 16
        factor = tl.load(alpha + expert)
        if GATED:
            acc, up = acc * factor, up * factor
            acc = acc / (1.0 + tl.exp(-acc)) * up
            target = row.to(tl.int64)
        else:
            acc = acc * (factor * tl.load(weights + place))[None, :]
            target = place
        inside = (channel < n)[:, None] & (row < end)[None, :]
        tl.store(out + target[None, :] * n + channel[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["top_k"])
def sum_choices_kernel(rows, chosen, out, n, top_k, BLOCK: tl.constexpr):
    """``out[t] = rows[t k] + ... + rows[t k + k - 1]`` without those of negative experts."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < n
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(0, top_k):
        here = tl.load(chosen + token * top_k + j) >= 0
        acc += tl.load(rows + (token * top_k + j) * n + channel, mask=inside & here, other=0.0).to(tl.float32)
    tl.store(out + token * n + channel, acc.to(out.dtype.element_ty), mask=inside)


def choose_tile(choices: int, experts: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps and stages for a number of choices among some experts."""
    rows = choices / experts
    limit, m, n, k, warps, stages = next(tile for tile in TILES if tile[0] is None or rows <= tile[0])
    return m, n, k, warps, stages


def warm_up(gate_up: ExpertStack, down: ExpertStack, top_k: int, dtype: torch.dtype) -> None:
    """Compile every tile for these weights, with one token of zeros."""
    device = down.packed.device
    x = torch.zeros(1, down.packed.shape[1], dtype=dtype, device=device)
    chosen = torch.arange(top_k, dtype=torch.int32, device=device).unsqueeze(0)
    for _, *tile in TILES:
        nvfp4_experts(x, torch.ones(1, top_k, device=device), chosen, gate_up, down, tile)


def nvfp4_experts(x, weights, chosen, gate_up: ExpertStack, down: ExpertStack, tile=None) -> torch.Tensor:
    """The arguments and results are those of :func:`qerl_verl.kernels.triton.experts`; ``tile``
    replaces what :func:`choose_tile` gives."""
    tokens, hidden = x.shape
    count, top_k, inner = len(down.packed), chosen.shape[1], down.packed.shape[2] * 2
    choices = tokens * top_k
    # The interpreter has no bfloat16 arithmetic and its cast to bfloat16 truncates: float32 there.
    emulated = INTERPRETED and x.dtype == torch.bfloat16
    dot = tl.float32 if emulated else tl.float16 if x.dtype == torch.float16 else tl.bfloat16
    middle = torch.float32 if emulated else x.dtype
    x, weights, chosen = x.contiguous(), weights.float().contiguous(), chosen.int().contiguous()
    order = torch.empty(choices, dtype=torch.int32, device=x.device)
    bounds = torch.empty(count, 2, dtype=torch.int32, device=x.device)
    sort_choices_kernel[(count,)](chosen, order, bounds, choices, BLOCK=SORT_BLOCK, num_warps=4)
    block_m, block_n, block_k, warps, stages = tile or choose_tile(choices, count)
    gated = torch.empty(choices, inner, dtype=middle, device=x.device)
    rows = torch.empty(choices, hidden, dtype=middle, device=x.device)
    for source, stack, out, is_gated in ((x, gate_up, gated, True), (gated, down, rows, False)):
        n, k = out.shape[1], source.shape[1]
        grid = (triton.cdiv(n, block_n), count, triton.cdiv(tokens, block_m))
        grouped_gemm_kernel[grid](
            source, stack.packed, stack.scale.view(torch.uint8), stack.alpha, order, bounds, weights, out, n, k // 64,
            top_k, GATED=is_gated, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k if k % block_k == 0 else 64,
            DOT=dot, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    out = torch.empty(tokens, hidden, dtype=middle, device=x.device)
    sum_choices_kernel[(tokens, triton.cdiv(hidden, SUM_BLOCK))](
        rows, chosen, out, hidden, top_k, BLOCK=SUM_BLOCK, num_warps=4
    )
    return out.to(x.dtype)
