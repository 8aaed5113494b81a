"""Provides the functions of the Hopper kernels, and the PyTorch operators behind them.

The operators are ``torch.ops.qerl_hopper.nvfp4_gemm``, ``nvfp4_lora_gemm`` and
``nvfp4_block_values``. They run on their tensors' device, never synchronize and can be captured
into CUDA graphs. The first call on a device loads the kernels, which a capture must not do, so
:func:`~qerl_verl.kernels.hopper.support.unsupported_device` has to be called before. None has
autograd: the training layer calls :func:`block_values` for its backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import library

from qerl_verl.kernels.device_guard import on_tensors_device
from qerl_verl.kernels.hopper import tuning
from qerl_verl.kernels.hopper.launch import run_plan, write_block_values
from qerl_verl.kernels.hopper.support import prepare, unsupported_adapter
from qerl_verl.kernels.packed_weight import PackedWeight


def gemm(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``x (e2m1 * scale)^T / global_scale + bias``.

    Args:
        x: ``[..., K]`` bfloat16.
        weight: ``[N, K]``, from :func:`~qerl_verl.kernels.hopper.layout.prepack`. Its global scale
            divides the float32 accumulator.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` bfloat16.
    """
    return torch.ops.qerl_hopper.nvfp4_gemm(x, *weight, bias)


def lora_gemm(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b_p: torch.Tensor,
    ends: Sequence[int],
    scaling: float,
) -> torch.Tensor:
    """Returns :func:`gemm` plus one LoRA delta, ``scaling (x A_i^T) B_i^T`` for the rows of each
    fused projection ``i``.

    Args:
        x, weight, bias: as for :func:`gemm`.
        lora_a: ``[projections * rank, K]`` bfloat16, the A of each projection in turn.
        lora_b_p: ``[N, rank]`` bfloat16, the B of each projection in turn, from
            :func:`~qerl_verl.kernels.hopper.layout.prepack_lora_b`.
        ends: the row at which each projection ends; the last is N. At most three.
        scaling: lora_alpha / rank, on the host.

    Returns:
        ``[..., N]`` bfloat16, rounded once; ``x A^T`` is rounded to bfloat16 in between.

    Raises:
        ValueError: shapes that :func:`~qerl_verl.kernels.hopper.support.unsupported_adapter`
            reports.
    """
    return torch.ops.qerl_hopper.nvfp4_lora_gemm(x, *weight, bias, lora_a, lora_b_p, list(ends), scaling)


def block_values(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns ``e2m1 * scale``, exactly, ``[N, K]`` bfloat16, from the tensors of
    :func:`~qerl_verl.kernels.hopper.layout.prepack`."""
    return torch.ops.qerl_hopper.nvfp4_block_values(packed, scale)


def decodes_first(tokens: int, n: int, k: int) -> bool:
    """Returns whether :func:`gemm` makes a bfloat16 weight for that many tokens and calls cuBLAS
    on it."""
    return tuning.choose(tokens, n, k, _multiprocessors()) == tuning.DECODE_FIRST


@functools.cache
def _multiprocessors() -> int:
    """Returns the multiprocessors of the current device, or those of an H100 if there is none."""
    if not torch.cuda.is_available():
        return tuning.MEASURED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _rows_of(x: torch.Tensor, k: int) -> torch.Tensor:
    if x.dtype != torch.bfloat16 or x.shape[-1] != k:
        raise ValueError(f"x has to be bfloat16 [..., {k}], got {x.dtype} {tuple(x.shape)}")
    rows = x.reshape(-1, k).contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _gemm(x, packed, scale, global_scale, bias=None):
    n, k = packed.shape[0], packed.shape[1] * 2
    rows = _rows_of(x, k)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan = tuning.choose(rows.shape[0], n, k, prepare(x.device.index))
    return run_plan(rows, PackedWeight(packed, scale, global_scale), bias, plan).view(*x.shape[:-1], n)


def _lora_gemm(x, packed, scale, global_scale, bias, lora_a, lora_b_p, ends, scaling):
    n, k = packed.shape[0], packed.shape[1] * 2
    rows = _rows_of(x, k)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    rank = lora_a.shape[0] // len(ends)
    if reason := unsupported_adapter(n, k, rank, ends):
        raise ValueError(reason)
    if tuple(lora_a.shape) != (len(ends) * rank, k) or tuple(lora_b_p.shape) != (n, rank):
        raise ValueError(
            f"LoRA of {tuple(lora_a.shape)} and {tuple(lora_b_p.shape)} does not fit {n} x {k} and ends {ends}"
        )
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    align = tuning.alignment(ends)
    sms = prepare(x.device.index)
    plan = tuning.choose(rows.shape[0], n, k, sms, align)
    how = tuning.choose_shrink(rows.shape[0], n, k, lora_a.shape[0], sms, align)
    weight = PackedWeight(packed, scale, global_scale)
    lora = (lora_a.contiguous(), lora_b_p.contiguous(), tuple(ends), scaling)
    return run_plan(rows, weight, bias, plan, lora=lora, how=how).view(*x.shape[:-1], n)


library.define(
    "qerl_hopper::nvfp4_gemm",
    "(Tensor x, Tensor packed, Tensor scale, float global_scale, Tensor? bias=None) -> Tensor",
)
library.define(
    "qerl_hopper::nvfp4_lora_gemm",
    "(Tensor x, Tensor packed, Tensor scale, float global_scale, Tensor? bias, Tensor lora_a, "
    "Tensor lora_b_p, int[] ends, float scaling) -> Tensor",
)
library.define("qerl_hopper::nvfp4_block_values", "(Tensor packed, Tensor scale) -> Tensor")
OPERATORS = {
    "nvfp4_gemm": on_tensors_device(_gemm),
    "nvfp4_lora_gemm": on_tensors_device(_lora_gemm),
    "nvfp4_block_values": on_tensors_device(write_block_values),
}
"""What each operator of ``torch.ops.qerl_hopper`` runs on CUDA."""

for _name, _function in OPERATORS.items():
    library.impl(f"qerl_hopper::{_name}", "CUDA", _function)


@library.register_fake("qerl_hopper::nvfp4_gemm")
def _(x, packed, scale, global_scale, bias=None):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@library.register_fake("qerl_hopper::nvfp4_lora_gemm")
def _(x, packed, scale, global_scale, bias, lora_a, lora_b_p, ends, scaling):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@library.register_fake("qerl_hopper::nvfp4_block_values")
def _(packed, scale):
    return packed.new_empty((packed.shape[0], packed.shape[1] * 2), dtype=torch.bfloat16)
