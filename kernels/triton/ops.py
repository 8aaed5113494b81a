"""Provides the functions of the Triton kernels, and the PyTorch operators behind them.

:func:`block_values` and :func:`gemm` call ``torch.ops.qerl_triton.nvfp4_block_values`` and
``nvfp4_gemm``, which have shapes for torch.compile. No function synchronizes, and each runs on the
current stream of its tensors' device. Triton compiles a kernel on its first call for a dtype and
tile, so each has to be called once before a CUDA graph is captured. None has autograd: the training
layer calls :func:`block_values` for its backward pass.
"""

from __future__ import annotations

import contextlib

import torch
from torch import library

from qerl_verl.kernels.device_guard import on_tensors_device
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.nvfp4_experts import ExpertAdapter, ExpertStack
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.triton.support import (
    LORA_UNIT,
    padded_expert_rank,
    require,
    unsupported_experts,
    unsupported_weight,
)


def block_values(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns ``e2m1 * scale``, exactly: the weight without its per-tensor divisor.

    Args:
        packed: ``[N, K / 2]`` uint8, K a multiple of 16.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8; finite, of either sign.
        dtype: bfloat16 or float16.

    Returns:
        ``[N, K]``, row-major, in ``dtype``.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: the kernels cannot run here, or the tensors are not on a CUDA device.
    """
    return torch.ops.qerl_triton.nvfp4_block_values(packed, scale, dtype)


def gemm(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    u: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``x (e2m1 * scale)^T / global_scale + bias + u lora_b^T``, summed in float32.

    :func:`~qerl_verl.kernels.triton.tuning.choose` tells the path. For many tokens it is a
    temporary weight in 16 bits and torch.addmm; the LoRA delta is then added to a result that is
    already rounded to ``x.dtype``. On every other path the output is rounded once. The same call
    on the same kind of GPU sums in the same order each time.

    Args:
        x: ``[..., K]`` bfloat16 or float16, K a multiple of 64.
        weight: ``[N, K]``, in the checkpoint's layout. Its scales are finite and of either sign;
            its global scale divides the float32 accumulator of the base's GEMM.
        bias: ``[N]`` or None; taken in ``x.dtype``.
        u: ``[..., R]`` in ``x.dtype`` or None: ``x`` times the transposed LoRA A, with LoRA's
            scaling in it. R is a multiple of 16.
        lora_b: ``[N, R]`` in ``x.dtype``, given if ``u`` is.

    Returns:
        ``[..., N]`` in ``x.dtype``.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: the kernels cannot run here, or the tensors are not on a CUDA device.
    """
    return torch.ops.qerl_triton.nvfp4_gemm(x, *weight, bias, u, lora_b)


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: ExpertStack,
    down: ExpertStack,
    adapter: ExpertAdapter | None = None,
) -> torch.Tensor:
    """Returns the weighted sum of the chosen experts' outputs of each token, as
    :func:`qerl_verl.kernels.nvfp4_experts.nvfp4_experts_reference` defines it.

    It is neither an operator nor differentiable: the rollout calls it behind an operator of the
    engine's.

    Args:
        x: ``[T, H]`` bfloat16 or float16, H a multiple of 64.
        weights: ``[T, k]``.
        chosen: ``[T, k]`` integers; negative ones add nothing.
        gate_up: ``[E, 2 I, ...]``, I a multiple of 64.
        down: ``[E, H, ...]``.
        adapter: in ``x.dtype``, contiguous, of a rank that
            :func:`~qerl_verl.kernels.triton.support.padded_expert_rank` returns; or None.

    Returns:
        ``[T, H]`` in ``x.dtype``. Between the GEMMs and before the sum, values are rounded to it.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: the kernels cannot run here, or the tensors are not on a CUDA device.
    """
    hidden, inner = x.shape[-1], down.packed.shape[2] * 2
    if reason := unsupported_experts(hidden, inner, x.dtype):
        raise ValueError(reason)
    if x.ndim != 2 or weights.shape != chosen.shape or chosen.ndim != 2 or len(chosen) != len(x):
        raise ValueError(
            f"x has to be [T, H], weights and chosen [T, k], got {tuple(x.shape)}, "
            f"{tuple(weights.shape)} and {tuple(chosen.shape)}"
        )
    count = len(down.packed)
    for stack, n, k in ((gate_up, 2 * inner, hidden), (down, hidden, inner)):
        shapes = tuple(stack.packed.shape), tuple(stack.scale.shape), tuple(stack.factors.shape)
        if shapes != ((count, n, k // 2), (count, n, k // BLOCK_SIZE), (count,)):
            raise ValueError(f"{count} experts of {n} x {k} need other shapes than {shapes}")
        if not (stack.packed.is_contiguous() and stack.scale.is_contiguous()):
            raise ValueError("packed values and scales of the experts have to be contiguous")
    factors = () if adapter is None else _adapter_factors(adapter, count, hidden, inner, x.dtype)
    require(x)
    if len(x) == 0:
        return x.new_empty(x.shape)
    parts = [(s.packed, s.scale, s.factors.float()) for s in (gate_up, down)]
    return _experts(x, weights, chosen, *parts[0], *parts[1], *factors)


def _adapter_factors(adapter: ExpertAdapter, count: int, hidden: int, inner: int, dtype: torch.dtype) -> tuple:
    factors = adapter.gate_up_a, adapter.gate_up_b, adapter.down_a, adapter.down_b
    rank, found = adapter.down_b.shape[-1], tuple(tuple(t.shape) for t in factors)
    shapes = (count, 2 * rank, hidden), (count, 2 * inner, rank), (count, rank, inner), (count, hidden, rank)
    if found != shapes or padded_expert_rank(rank) != rank:
        raise ValueError(
            f"an adapter on {count} experts of {inner} x {hidden} needs shapes {shapes} with a "
            f"rank that is a power of two from 16 on, got {found}"
        )
    if any(t.dtype != dtype or not t.is_contiguous() for t in factors):
        raise ValueError(f"the adapter on the experts has to be contiguous and {dtype}, as x is")
    return (*factors, adapter.scaling)


def warm_up_experts(
    gate_up: ExpertStack, down: ExpertStack, top_k: int, dtype: torch.dtype, adapter: ExpertAdapter | None = None
) -> None:
    """Compiles what :func:`experts` launches for these weights, whatever the number of tokens.

    Triton compiles nothing while a CUDA graph is captured. The arguments are those of
    :func:`experts`.
    """
    require(down.packed)
    from qerl_verl.kernels.triton.nvfp4_experts import warm_up

    with torch.cuda.device(down.packed.device) if down.packed.is_cuda else contextlib.nullcontext():
        warm_up(gate_up, down, top_k, dtype, adapter)


def _check_weight(packed: torch.Tensor, scale: torch.Tensor) -> None:
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"packed has to be uint8 [N, K / 2], got {packed.dtype} {tuple(packed.shape)}")
    n, k = packed.shape[0], packed.shape[1] * 2
    if scale.shape != (n, k // BLOCK_SIZE) or k % BLOCK_SIZE:
        raise ValueError(
            f"packed {tuple(packed.shape)} holds {k} input channels, which need scales of shape "
            f"({n}, {k // BLOCK_SIZE}) and a multiple of {BLOCK_SIZE}; got {tuple(scale.shape)}"
        )
    if scale.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"scale has to be float8_e4m3fn, or the same bytes as uint8, got {scale.dtype}")


def _block_values(packed, scale, dtype):
    _check_weight(packed, scale)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype has to be bfloat16 or float16, got {dtype}")
    require(packed)
    from qerl_verl.kernels.triton.nvfp4_block_values import nvfp4_block_values

    return nvfp4_block_values(packed, scale, dtype)


def _gemm(x, packed, scale, global_scale, bias=None, u=None, lora_b=None):
    _check_weight(packed, scale)
    n, k = packed.shape[0], packed.shape[1] * 2
    if reason := unsupported_weight(n, k, x.dtype):
        raise ValueError(reason)
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has to be [..., {k}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has to be [{n}], got {tuple(bias.shape)}")
    if (u is None) != (lora_b is None):
        raise ValueError("u and lora_b have to be given together")
    if u is not None:
        rank = u.shape[-1] if u.ndim else 0
        if u.shape[:-1] != x.shape[:-1] or rank % LORA_UNIT or rank == 0 or lora_b.shape != (n, rank):
            raise ValueError(
                f"u has to be {(*x.shape[:-1], 'R')} and lora_b ({n}, R), R a multiple of "
                f"{LORA_UNIT}; got {tuple(u.shape)} and {tuple(lora_b.shape)}"
            )
        if u.dtype != x.dtype or lora_b.dtype != x.dtype:
            raise ValueError(f"u and lora_b have to be {x.dtype} as x is, got {u.dtype} and {lora_b.dtype}")
    require(x)
    from qerl_verl.kernels.triton.nvfp4_gemm import nvfp4_gemm

    return nvfp4_gemm(x, PackedWeight(packed, scale, global_scale), bias, u, lora_b)


@on_tensors_device
def _experts(x, weights, chosen, *parts):
    from qerl_verl.kernels.triton.nvfp4_experts import nvfp4_experts

    adapter = ExpertAdapter(*parts[6:]) if len(parts) > 6 else None
    return nvfp4_experts(x, weights, chosen, ExpertStack(*parts[:3]), ExpertStack(*parts[3:6]), adapter)


library.define("qerl_triton::nvfp4_block_values", "(Tensor packed, Tensor scale, ScalarType dtype) -> Tensor")
library.define(
    "qerl_triton::nvfp4_gemm",
    "(Tensor x, Tensor packed, Tensor scale, float global_scale, Tensor? bias=None, Tensor? "
    "u=None, Tensor? lora_b=None) -> Tensor",
)
OPERATORS = {
    "nvfp4_block_values": on_tensors_device(_block_values),
    "nvfp4_gemm": on_tensors_device(_gemm),
}
"""What each operator of ``torch.ops.qerl_triton`` runs."""

for _name, _function in OPERATORS.items():
    library.impl(f"qerl_triton::{_name}", ("cpu", "cuda"), _function)


@library.register_fake("qerl_triton::nvfp4_block_values")
def _(packed, scale, dtype):
    return packed.new_empty((packed.shape[0], packed.shape[1] * 2), dtype=dtype)


@library.register_fake("qerl_triton::nvfp4_gemm")
def _(x, packed, scale, global_scale, bias=None, u=None, lora_b=None):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))
