"""Computes the experts of a mixture with NVFP4 weights.

The reference is ``kernels/nvfp4_experts.py``. There are four launches. None depends on a value that
the host would have to read, so a CUDA graph can hold them:

1. sort the choices ``[T, k]`` by expert; 2. compute gate and up of every choice, and ``silu(gate) *
up``; 3. compute down, times the weight of the choice; 4. add up the choices of each token.

An adapter on the experts adds a launch in front of the second and of the third. It computes u =
scaling A x of every choice, which the grouped GEMM multiplies by B while it adds up a tile.

The second and third launches are grouped GEMMs. A program computes BLOCK_N output channels of
BLOCK_M rows of one expert. The grid has room for all tokens in each expert, and a program without
rows ends at once. No sum depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qerl_verl.kernels.nvfp4_experts import ExpertAdapter, ExpertStack
from qerl_verl.kernels.triton.nvfp4_format import (
    E2M1_FACTOR,
    INTERPRETED,
    e2m1_high_to_float32,
    e2m1_low_to_float32,
    e4m3_to_float32,
)

SORT_BLOCK = 1024
SUM_BLOCK = 512
SHRINK_BLOCKS = 16, 16, 64
"""BLOCK_M, BLOCK_R and BLOCK_K of the launch that multiplies by A."""
RANK_BLOCK = 64
"""B is multiplied in steps of so many columns, of an adapter whose rank is a power of two from
16 on."""
# (rows of an expert up to, BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), rows on average
TILES = (
    (16, 16, 32, 128, 4, 3),
    (32, 32, 64, 64, 4, 3),
    (None, 64, 64, 64, 4, 3),
)
"""The tiles that are launched. They fit into the shared memory of every GPU that Triton serves."""


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
    """Returns the even and the odd columns of a tile of ``e2m1 * scale``,
    ``[BLOCK_N, BLOCK_K / 2]`` each."""
    byte = tl.load(packed_at)
    s = (e4m3_to_float32(tl.load(scale_at)) * E2M1_FACTOR)[:, :, None]
    even = tl.reshape((e2m1_low_to_float32(byte) * s).to(DOT), (BLOCK_N, BLOCK_K // 2))
    odd = tl.reshape((e2m1_high_to_float32(byte) * s).to(DOT), (BLOCK_N, BLOCK_K // 2))
    return even, odd


@triton.jit(do_not_specialize=["top_k"])
def shrink_kernel(
    x, lora_a, order, bounds, u, rank, k_64, top_k, scaling,
    GATHERED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Writes ``u`` [S, rank] = scaling * x A^T for the rows of one expert, with ``lora_a`` [E,
    rank, K] and rank a multiple of BLOCK_R.

    GATHERED: row r of the sorted choices is token ``order[r] // top_k`` of ``x``. Otherwise row r
    is row r of ``x``.
    """
    column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert = tl.program_id(1)
    begin, end = tl.load(bounds + 2 * expert), tl.load(bounds + 2 * expert + 1)
    first = begin + tl.program_id(2) * BLOCK_M
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        inside = tl.minimum(row, end - 1).to(tl.int64)  # rows beyond the end are never stored
        source = tl.load(order + inside).to(tl.int64) // top_k if GATHERED else inside
        k, step = k_64 * 64, tl.arange(0, BLOCK_K)
        x_at = x + source[:, None] * k + step[None, :]
        a_at = lora_a + (expert.to(tl.int64) * rank + column)[:, None] * k + step[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for _ in range(0, k // BLOCK_K):
            acc = tl.dot(tl.load(x_at).to(DOT), tl.trans(tl.load(a_at).to(DOT)), acc)
            x_at += BLOCK_K
            a_at += BLOCK_K
        target = u + row.to(tl.int64)[:, None] * rank + column[None, :]
        tl.store(target, (acc * scaling).to(u.dtype.element_ty), mask=(row < end)[:, None])


@triton.jit
def _add_lora(acc, u_at, b_at, RANK: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr):
    """Returns ``acc`` [BLOCK_N, BLOCK_M] plus B u^T, from pointers to the first BLOCK_R columns
    of either."""
    for _ in range(0, RANK // BLOCK_R):
        acc = tl.dot(tl.load(b_at).to(DOT), tl.trans(tl.load(u_at).to(DOT)), acc)
        u_at += BLOCK_R
        b_at += BLOCK_R
    return acc


@triton.jit(do_not_specialize=["top_k"])
def grouped_gemm_kernel(
    x, packed, scale, factors, order, bounds, weights, u, lora_b, out, n, k_64, top_k,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
    RANK: tl.constexpr = 0, BLOCK_R: tl.constexpr = 16,
):  # fmt: skip
    """Writes ``out`` [S, n] for the rows of one expert.

    RANK is the rank of an adapter, whose ``u`` is [S, 2 RANK] for gate and up and [S, RANK] for
    down, and whose ``lora_b`` is [E, rows of the weight, RANK]. Without an adapter RANK is 0, and
    the kernel reads neither.

    GATED: row r of the sorted choices is token ``order[r] // top_k`` of ``x``, the weight has 2 n
    rows, and the kernel stores silu(gate) * up at r. Otherwise row r is row r of ``x``, and the
    kernel stores factor and weight times the output at ``order[r]``.
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
        factor = tl.load(factors + expert)
        acc = acc * factor
        if RANK > 0:
            r = tl.arange(0, BLOCK_R)
            b_at = lora_b + weight_row[:, None] * RANK + r[None, :]
            u_width = 2 * RANK if GATED else RANK
            u_at = u + tl.minimum(row, end - 1).to(tl.int64)[:, None] * u_width + r[None, :]
            acc = _add_lora(acc, u_at, b_at, RANK, BLOCK_R, DOT)
        if GATED:
            up = up * factor
            if RANK > 0:
                up = _add_lora(up, u_at + RANK, b_at + n.to(tl.int64) * RANK, RANK, BLOCK_R, DOT)
            acc = acc / (1.0 + tl.exp(-acc)) * up
            target = row.to(tl.int64)
        else:
            acc = acc * tl.load(weights + place)[None, :]
            target = place
        inside = (channel < n)[:, None] & (row < end)[None, :]
        tl.store(out + target[None, :] * n + channel[:, None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["top_k"])
def sum_choices_kernel(rows, chosen, out, n, top_k, BLOCK: tl.constexpr):
    """Computes ``out[t] = rows[t k] + ... + rows[t k + k - 1]`` without the rows of negative
    experts.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < n
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(0, top_k):
        here = tl.load(chosen + token * top_k + j) >= 0
        acc += tl.load(rows + (token * top_k + j) * n + channel, mask=inside & here, other=0.0).to(tl.float32)
    tl.store(out + token * n + channel, acc.to(out.dtype.element_ty), mask=inside)


def choose_tile(choices: int, experts: int) -> tuple[int, int, int, int, int]:
    """Returns BLOCK_M, BLOCK_N, BLOCK_K, warps and stages for a number of choices among some
    experts.
    """
    rows = choices / experts
    limit, m, n, k, warps, stages = next(tile for tile in TILES if tile[0] is None or rows <= tile[0])
    return m, n, k, warps, stages


def warm_up(
    gate_up: ExpertStack, down: ExpertStack, top_k: int, dtype: torch.dtype, adapter: ExpertAdapter | None = None
) -> None:
    """Compiles every tile for these weights, with one token of zeros."""
    device = down.packed.device
    x = torch.zeros(1, down.packed.shape[1], dtype=dtype, device=device)
    chosen = torch.arange(top_k, dtype=torch.int32, device=device).unsqueeze(0)
    for _, *tile in TILES:
        nvfp4_experts(x, torch.ones(1, top_k, device=device), chosen, gate_up, down, adapter, tile)


def nvfp4_experts(
    x, weights, chosen, gate_up: ExpertStack, down: ExpertStack, adapter: ExpertAdapter | None = None, tile=None
) -> torch.Tensor:
    """Takes the arguments and returns the results of :func:`qerl_verl.kernels.triton.experts`;
    ``tile`` replaces what :func:`choose_tile` gives."""
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
        u, lora_b, rank = x, x, 0  # any pointer: they are not read
        if adapter is not None:
            lora_a, lora_b = (adapter.gate_up_a, adapter.gate_up_b) if is_gated else (adapter.down_a, adapter.down_b)
            rank, width = lora_b.shape[2], lora_a.shape[1]
            u = torch.empty(choices, width, dtype=middle, device=x.device)
            shrink_m, shrink_r, shrink_k = SHRINK_BLOCKS
            shrink_kernel[(width // shrink_r, count, triton.cdiv(tokens, shrink_m))](
                source, lora_a, order, bounds, u, width, k // 64, top_k, adapter.scaling, GATHERED=is_gated,
                BLOCK_M=shrink_m, BLOCK_R=shrink_r, BLOCK_K=shrink_k, DOT=dot, num_warps=4,
            )  # fmt: skip
        grid = (triton.cdiv(n, block_n), count, triton.cdiv(tokens, block_m))
        grouped_gemm_kernel[grid](
            source, stack.packed, stack.scale.view(torch.uint8), stack.factors, order, bounds, weights, u, lora_b, out, n,
            k // 64, top_k, GATED=is_gated, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_K=block_k if k % block_k == 0 else 64, DOT=dot, RANK=rank, BLOCK_R=min(rank or 16, RANK_BLOCK),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    out = torch.empty(tokens, hidden, dtype=middle, device=x.device)
    sum_choices_kernel[(tokens, triton.cdiv(hidden, SUM_BLOCK))](
        rows, chosen, out, hidden, top_k, BLOCK=SUM_BLOCK, num_warps=4
    )
    return out.to(x.dtype)
