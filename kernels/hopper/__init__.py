"""NVFP4 weights on Hopper GPUs: ``y = alpha x (e2m1 * scale)^T + bias``, with the term of one LoRA adapter if wanted, for any
number of tokens, and dequantization.

The weight is permuted once (:func:`prepack`; same size) and then serves decoding, prefill and training alike:

* :func:`gemm` decodes it on its way to the tensor cores, or, for many tokens, into a temporary bfloat16 weight for cuBLAS;
* :func:`lora_gemm` adds ``scaling (x A^T) B^T`` inside the same kernel, for fused projections with an A and a B each;
* :func:`dequantize` writes that row-major bfloat16 weight, exactly ``e2m1 * scale``; also what the backward pass needs.

All are registered with PyTorch as ``torch.ops.qerl_hopper.nvfp4_gemm``, ``nvfp4_lora_gemm`` and ``nvfp4_dequantize``, can be
captured into CUDA graphs (call :func:`initialize` before) and never synchronize. They run on their
tensors' device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import library

from .. import autotune
from ..device_guard import on_tensors_device
from ..nvfp4_lora_linear import add_lora_reference
from . import build, measure, tuning
from .build import load_library
from .layout import LORA_UNIT, UNIT, check_shape, prepack, prepack_lora_b, unpack, unpack_lora_b

__all__ = [
    "availability", "check", "check_lora", "dequantize", "gemm", "initialize", "is_available", "lora_gemm",
    "prepack", "prepack_lora_b", "unpack", "unpack_lora_b",
]  # fmt: skip

_COUNTER_SLOTS = 64
FRAGMENT_UNIT = 128.0
"""The kernel's accumulator is that of weights times 1 / 128 (``kFragmentUnit`` of nvfp4_format.cuh)."""
_slots: dict[tuple[int, int], int] = {}
_launches = itertools.count()


def availability(device: int | None = None) -> str | None:
    """Why the kernels cannot run on CUDA device ``device`` (default: the current one), one line, or
    None if they can.

    Compiles them if need be, loads them and prepares the device, once in a process, so None means
    that they have been seen to load. What costs that much comes after what can be known without.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _availability(torch.cuda.current_device() if device is None else device)


@functools.cache
def _availability(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the kernels are for compute capability 9.0 (Hopper), this device has {major}.{minor}"
    if reason := build.problem():
        return reason
    try:
        _prepare(device)
    except RuntimeError as error:
        return build.last_line(str(error))
    return None


def is_available() -> bool:
    return availability() is None


def check(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why an ``[n, k]`` weight with ``dtype`` activations is not served here, or None if it is."""
    if dtype != torch.bfloat16:
        return f"activations have to be bfloat16, got {dtype}"
    return check_shape(n, k)


def check_lora(n: int, k: int, rank: int, ends: Sequence[int]) -> str | None:
    """Why an adapter on an ``[n, k]`` weight is not served by :func:`lora_gemm`, or None if it is."""
    if rank % LORA_UNIT or rank < LORA_UNIT:
        return f"the rank has to be a multiple of {LORA_UNIT}, got {rank}"
    if not 1 <= len(ends) <= 3 or list(ends) != sorted(ends) or ends[-1] != n:
        return f"one to three projections that end at row {n} are possible, got {list(ends)}"
    if len(ends) > 1 and any(end % (2 * UNIT) for end in ends):
        return f"projections have to end at multiples of {2 * UNIT} rows, got {list(ends)}"
    return None


@functools.cache
def _prepare(device: int) -> int:
    """Loads the kernels on a device; returns its number of multiprocessors."""
    with torch.cuda.device(device):
        library = load_library()
        error = library.qerl_nvfp4_prepare()
        if error:
            raise RuntimeError(
                f"preparing the Hopper kernels failed with CUDA error {error} ({library.qerl_cuda_error(error).decode()})"
            )
        return torch.cuda.get_device_properties(device).multi_processor_count


def initialize() -> None:
    """Compile if need be, and load, on the current device. Any first call does so; a CUDA graph capture should not."""
    reason = availability()
    if reason:
        raise RuntimeError(reason)
    _prepare(torch.cuda.current_device())


def dequantizes(tokens: int, n: int, k: int) -> bool:
    """Whether :func:`gemm` makes a bfloat16 weight for that many tokens and calls cuBLAS on it."""
    return tuning.choose(tokens, n, k, _multiprocessors()) == tuning.DEQUANTIZE


@functools.cache
def _multiprocessors() -> int:
    """Of the current device; those of an H100 or H200 where there is none."""
    if not torch.cuda.is_available():
        return tuning.MEASURED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def tune(device: torch.device, n: int, k: int, ends: Sequence[int] | None = None, rank: int = 32) -> str | None:
    """Measure the launch configurations of an ``[n, k]`` weight, unless the cache has them, and use
    the fastest.

    Args:
        device: a Hopper GPU.
        ends: for :func:`lora_gemm`, the row at which each fused projection ends; None for
            :func:`gemm`.
        rank: of the adapter, a multiple of 16.

    Returns:
        A sentence that says what was measured, or why the built-in table stays in use; None if
        neither.
    """
    if not autotune.enabled():
        return None
    with torch.cuda.device(device):
        _prepare(torch.cuda.current_device())
        return measure.tune(n, k, ends, rank)


def shrink(
    x, lora_a, n: int, factor: float, pdl: int = 1, flag: int | None = None, how: tuning.Shrink | None = None
) -> torch.Tensor:
    """``factor x A^T`` [M, rows of A], through ``lora_shrink.cu`` up to ``SHRINK_LIMIT`` tokens and cuBLAS beyond.

    ``n``: rows of the product that follows. ``flag``: address of what the kernel sets when the kernels before it are complete,
    or None.
    """
    m, k = x.shape
    rows = lora_a.shape[0]
    if m > tuning.SHRINK_LIMIT:
        return torch.addmm(x.new_empty(rows), x, lora_a.t(), beta=0, alpha=factor)
    u = torch.empty((m, rows), dtype=x.dtype, device=x.device)
    how = tuning.choose_shrink(m, n, k, rows, _prepare(x.device.index)) if how is None else how
    error = load_library().qerl_lora_shrink(
        x.data_ptr(), lora_a.data_ptr(), u.data_ptr(), factor, m, k, rows, *how,
        flag, pdl, torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the LoRA kernel failed with error {error} for M, K, rows = {m}, {k}, {rows}")
    return u


def run_plan(
    x, packed_p, scale_p, alpha, bias, plan: tuning.Plan, pdl: int = 1, out=None, lora=None, how=None
) -> torch.Tensor:
    """:func:`gemm` with ``x`` [M, K] and an explicit plan.

    ``lora``: ``(lora_a, lora_b_p, ends, scaling)`` as for :func:`lora_gemm`, for plans with a kernel of ours. ``how``: a
    choice other than ``tuning.py``'s for x A^T, beside which the product already works on the base.

    ``pdl``: launch with programmatic dependent launch, so that a launch sets up and fetches its first weights (which no
    kernel writes) while the kernel before it drains; activations and results wait for that kernel's end.
    """
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    m = x.shape[0]
    if plan.config < 0:
        weight = dequantize(packed_p, scale_p)
        if bias is None:
            y = torch.addmm(x.new_empty(n), x, weight.t(), beta=0, alpha=alpha)
        else:
            y = torch.addmm(bias, x, weight.t(), alpha=alpha)
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
        u = shrink(x, lora_a, n, scaling / (alpha * FRAGMENT_UNIT), pdl, flag, how)
        ends = (*all_ends[:-1], 0, 0)[:2]
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device) if plan.workspace else None
    error = library.qerl_nvfp4_gemm(
        x.data_ptr(), packed_p.data_ptr(), scale_p.data_ptr(), alpha, None if bias is None else bias.data_ptr(), y.data_ptr(),
        None if u is None else u.data_ptr(), None if lora_b is None else lora_b.data_ptr(), rank, shards, *ends,
        flag, m, n, k, plan.config, plan.blocks, plan.cluster, None if workspace is None else workspace.data_ptr(), slot, pdl, stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the NVFP4 kernel failed with error {error} for M, N, K = {m}, {n}, {k} and {plan}")
    return y


def _rows_of(x: torch.Tensor, k: int) -> torch.Tensor:
    if x.dtype != torch.bfloat16 or x.shape[-1] != k:
        raise ValueError(f"x has to be bfloat16 [..., {k}], got {x.dtype} {tuple(x.shape)}")
    rows = x.reshape(-1, k).contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _gemm_cuda(x, packed_p, scale_p, alpha, bias=None):
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    rows = _rows_of(x, k)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan = tuning.choose(rows.shape[0], n, k, _prepare(x.device.index))
    return run_plan(rows, packed_p, scale_p, alpha, bias, plan).view(*x.shape[:-1], n)


def _lora_gemm_cuda(x, packed_p, scale_p, alpha, bias, lora_a, lora_b_p, ends, scaling):
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    rows = _rows_of(x, k)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    rank = lora_a.shape[0] // len(ends)
    if reason := check_lora(n, k, rank, ends):
        raise ValueError(reason)
    if tuple(lora_a.shape) != (len(ends) * rank, k) or tuple(lora_b_p.shape) != (n, rank):
        raise ValueError(
            f"LoRA of {tuple(lora_a.shape)} and {tuple(lora_b_p.shape)} does not fit {n} x {k} and ends {ends}"
        )
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    align = tuning.alignment(ends)
    sms = _prepare(x.device.index)
    plan = tuning.choose(rows.shape[0], n, k, sms, align)
    how = tuning.choose_shrink(rows.shape[0], n, k, lora_a.shape[0], sms, align)
    lora = (lora_a.contiguous(), lora_b_p.contiguous(), tuple(ends), scaling)
    return run_plan(rows, packed_p, scale_p, alpha, bias, plan, lora=lora, how=how).view(*x.shape[:-1], n)


def _dequantize_cuda(packed_p, scale_p):
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    out = torch.empty((n, k), dtype=torch.bfloat16, device=packed_p.device)
    stream = torch.cuda.current_stream(packed_p.device).cuda_stream
    _prepare(packed_p.device.index)
    error = load_library().qerl_nvfp4_dequantize(packed_p.data_ptr(), scale_p.data_ptr(), out.data_ptr(), n, k, stream)
    if error:
        raise RuntimeError(f"the NVFP4 dequantize kernel failed with CUDA error {error} for N, K = {n}, {k}")
    return out


library.define(
    "qerl_hopper::nvfp4_gemm", "(Tensor x, Tensor packed_p, Tensor scale_p, float alpha, Tensor? bias=None) -> Tensor"
)
library.define(
    "qerl_hopper::nvfp4_lora_gemm",
    "(Tensor x, Tensor packed_p, Tensor scale_p, float alpha, Tensor? bias, Tensor lora_a, Tensor lora_b_p, int[] ends, "
    "float scaling) -> Tensor",
)
library.define("qerl_hopper::nvfp4_dequantize", "(Tensor packed_p, Tensor scale_p) -> Tensor")
OPERATORS = {
    "nvfp4_gemm": on_tensors_device(_gemm_cuda),
    "nvfp4_lora_gemm": on_tensors_device(_lora_gemm_cuda),
    "nvfp4_dequantize": on_tensors_device(_dequantize_cuda),
}
"""What each operator of ``torch.ops.qerl_hopper`` runs on CUDA."""

for _name, _function in OPERATORS.items():
    library.impl(f"qerl_hopper::{_name}", "CUDA", _function)


@library.register_fake("qerl_hopper::nvfp4_gemm")
def _(x, packed_p, scale_p, alpha, bias=None):
    return x.new_empty((*x.shape[:-1], packed_p.shape[0]))


@library.register_fake("qerl_hopper::nvfp4_lora_gemm")
def _(x, packed_p, scale_p, alpha, bias, lora_a, lora_b_p, ends, scaling):
    return x.new_empty((*x.shape[:-1], packed_p.shape[0]))


@library.register_fake("qerl_hopper::nvfp4_dequantize")
def _(packed_p, scale_p):
    return packed_p.new_empty((packed_p.shape[0], packed_p.shape[1] * 2), dtype=torch.bfloat16)


def gemm(
    x: torch.Tensor, packed_p: torch.Tensor, scale_p: torch.Tensor, alpha: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``alpha * x (e2m1 * scale)^T + bias``.

    Args:
        x: ``[..., K]`` bfloat16.
        packed_p, scale_p: from :func:`prepack`.
        alpha: 1 / ``weight_global_scale``, applied to the float32 accumulator.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` bfloat16. No autograd: the training layer calls :func:`dequantize` for its backward pass.
    """
    return torch.ops.qerl_hopper.nvfp4_gemm(x, packed_p, scale_p, alpha, bias)


def lora_gemm(
    x: torch.Tensor,
    packed_p: torch.Tensor,
    scale_p: torch.Tensor,
    alpha: float,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b_p: torch.Tensor,
    ends: Sequence[int],
    scaling: float,
) -> torch.Tensor:
    """:func:`gemm` plus the term of one adapter, ``scaling (x A_i^T) B_i^T`` for the rows of each fused projection ``i``.

    Args:
        x, packed_p, scale_p, alpha, bias: as for :func:`gemm`.
        lora_a: ``[projections * rank, K]`` bfloat16, the A of each projection in turn.
        lora_b_p: ``[N, rank]`` bfloat16, the B of each projection in turn, from :func:`prepack_lora_b`.
        ends: the row at which each projection ends; the last is N. At most three.
        scaling: lora_alpha / rank, a number of the host.

    Returns:
        ``[..., N]`` bfloat16, rounded once; ``x A^T`` is rounded to bfloat16 in between. No autograd.

    Raises:
        ValueError: shapes that :func:`check_lora` refuses.
    """
    return torch.ops.qerl_hopper.nvfp4_lora_gemm(
        x, packed_p, scale_p, alpha, bias, lora_a, lora_b_p, list(ends), scaling
    )


def dequantize(packed_p: torch.Tensor, scale_p: torch.Tensor) -> torch.Tensor:
    """``[N, K]`` bfloat16, exactly ``e2m1 * scale``, from :func:`prepack`'s tensors."""
    return torch.ops.qerl_hopper.nvfp4_dequantize(packed_p, scale_p)
