"""Launches of the compiled Hopper kernels on the current stream of their tensors' device."""

from __future__ import annotations

import itertools

import torch

from qerl_verl.kernels.hopper import tuning
from qerl_verl.kernels.hopper.build import load_library
from qerl_verl.kernels.hopper.layout import unpack_lora_b
from qerl_verl.kernels.hopper.support import prepare
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
from qerl_verl.kernels.packed_weight import PackedWeight

FRAGMENT_UNIT = 128.0
"""The kernel's accumulator is that of weights times 1 / 128 (``kFragmentUnit`` of
nvfp4_format.cuh)."""

_COUNTER_SLOTS = 64
_slots: dict[tuple[int, int], int] = {}
_launches = itertools.count()


def shrink(
    x, lora_a, n: int, factor: float, pdl: int = 1, flag: int | None = None, how: tuning.Shrink | None = None
) -> torch.Tensor:
    """Returns ``factor x A^T`` ``[M, rows of A]``, through ``lora_shrink.cu`` for up to
    :data:`~qerl_verl.kernels.hopper.tuning.SHRINK_LIMIT` tokens and through cuBLAS beyond.

    Args:
        x: ``[M, K]`` bfloat16.
        lora_a: ``[rows of A, K]`` bfloat16.
        n: rows of the weight whose GEMM follows.
        factor: multiplied into the result.
        pdl: 1 for programmatic dependent launch, see :func:`run_plan`.
        flag: address that the kernel writes when the kernels before it are complete, or None.
        how: launch configuration; None asks :func:`~qerl_verl.kernels.hopper.tuning.choose_shrink`.
    """
    m, k = x.shape
    rows = lora_a.shape[0]
    if m > tuning.SHRINK_LIMIT:
        return torch.addmm(x.new_empty(rows), x, lora_a.t(), beta=0, alpha=factor)
    u = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    how = tuning.choose_shrink(m, n, k, rows, prepare(x.device.index)) if how is None else how
    error = load_library().qerl_lora_shrink(
        x.data_ptr(), lora_a.data_ptr(), u.data_ptr(), factor, m, k, rows, *how,
        flag, pdl, torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the LoRA kernel failed with error {error} for M, K, rows = {m}, {k}, {rows}")
    return u


def run_plan(
    x, weight: PackedWeight, bias, plan: tuning.Plan, pdl: int = 1, out=None, lora=None, how=None
) -> torch.Tensor:
    """Computes the GEMM of :func:`~qerl_verl.kernels.hopper.ops.gemm` with an explicit plan.

    Args:
        x: ``[M, K]`` bfloat16, contiguous, on a 16-byte boundary.
        weight: ``[N, K]``, from :func:`~qerl_verl.kernels.hopper.layout.prepack`.
        bias: ``[N]`` bfloat16 or None.
        plan: launch configuration.
        pdl: 1 launches with programmatic dependent launch: a kernel sets up and fetches its first
            weights, which no kernel writes, while the kernel before it drains. It waits for the end
            of that kernel before it reads activations or writes results.
        out: ``[M, N]`` to write to; None allocates it.
        lora: ``(lora_a, lora_b_p, ends, scaling)`` as for
            :func:`~qerl_verl.kernels.hopper.ops.lora_gemm`.
        how: launch configuration of x A^T, which runs while the GEMM already works on the base.

    Returns:
        ``[M, N]`` bfloat16.

    Raises:
        RuntimeError: the launch failed.
    """
    packed, scale, inverse_scale = weight.packed, weight.scale, 1.0 / weight.global_scale
    n, k = packed.shape[0], packed.shape[1] * 2
    m = x.shape[0]
    if plan.config < 0:
        values = write_block_values(packed, scale)
        if bias is None:
            y = torch.addmm(x.new_empty(n), x, values.t(), beta=0, alpha=inverse_scale)
        else:
            y = torch.addmm(bias, x, values.t(), alpha=inverse_scale)
        if lora is None:
            return y
        lora_a, lora_b_p, ends, scaling = lora
        return add_lora_reference(y, x, lora_a, unpack_lora_b(lora_b_p), ends, scaling)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device) if out is None else out
    library = load_library()
    stream = torch.cuda.current_stream(x.device).cuda_stream
    slot = _slots.setdefault((x.device.index, stream), len(_slots) % _COUNTER_SLOTS)
    u, lora_b, rank, shards, ends, flag = None, None, 0, 0, (0, 0), None
    if lora is not None:
        lora_a, lora_b, all_ends, scaling = lora
        shards = len(all_ends)
        rank = lora_a.shape[0] // shards
        if m <= tuning.SHRINK_LIMIT and pdl:
            flag = library.qerl_nvfp4_flag(slot, next(_launches))
        u = shrink(x, lora_a, n, scaling / (inverse_scale * FRAGMENT_UNIT), pdl, flag, how)
        ends = (*all_ends[:-1], 0, 0)[:2]
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device) if plan.workspace else None
    error = library.qerl_nvfp4_gemm(
        x.data_ptr(), packed.data_ptr(), scale.data_ptr(), inverse_scale, None if bias is None else bias.data_ptr(), y.data_ptr(),
        None if u is None else u.data_ptr(), None if lora_b is None else lora_b.data_ptr(), rank, shards, *ends,
        flag, m, n, k, plan.config, plan.blocks, plan.cluster, None if workspace is None else workspace.data_ptr(), slot, pdl, stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the NVFP4 kernel failed with error {error} for M, N, K = {m}, {n}, {k} and {plan}")
    return y


def write_block_values(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns ``e2m1 * scale``, ``[N, K]`` bfloat16, of a prepacked weight."""
    n, k = packed.shape[0], packed.shape[1] * 2
    out = torch.empty((n, k), dtype=torch.bfloat16, device=packed.device)
    stream = torch.cuda.current_stream(packed.device).cuda_stream
    prepare(packed.device.index)
    error = load_library().qerl_nvfp4_block_values(packed.data_ptr(), scale.data_ptr(), out.data_ptr(), n, k, stream)
    if error:
        raise RuntimeError(f"the NVFP4 kernel that decodes failed with CUDA error {error} for N, K = {n}, {k}")
    return out
