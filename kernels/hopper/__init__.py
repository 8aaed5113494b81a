"""NVFP4 weights on Hopper GPUs: ``y = alpha x (e2m1 * scale)^T + bias`` for any number of tokens, and dequantization.

The weight is permuted once (:func:`prepack`; same size) and then serves decoding, prefill and training alike:

* :func:`gemm` decodes it on its way to the tensor cores, or, for many tokens, into a temporary bfloat16 weight for cuBLAS;
* :func:`dequantize` writes that row-major bfloat16 weight, exactly ``e2m1 * scale``; also what the backward pass needs.

Both are registered with PyTorch as ``torch.ops.qerl_hopper.nvfp4_gemm`` and ``nvfp4_dequantize``, can be captured into CUDA
graphs (call :func:`initialize` before) and never synchronize.
"""

from __future__ import annotations

import functools

import torch
from torch import library

from . import tuning
from .build import find_nvcc, library_path, load_library
from .layout import check_shape, prepack, unpack

__all__ = [
    "availability", "check", "dequantize", "gemm", "initialize", "is_available", "prepack", "unpack",
]  # fmt: skip

_COUNTER_SLOTS = 64
_slots: dict[tuple[int, int], int] = {}


@functools.cache
def availability(device: int | None = None) -> str | None:
    """Why the kernels cannot run on CUDA device ``device`` (default: the current one), or None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the kernels are for compute capability 9.0 (Hopper), this device has {major}.{minor}"
    if not library_path().exists() and find_nvcc() is None:
        return "not compiled yet and no nvcc: set CUDA_HOME or put nvcc on PATH"
    return None


def is_available() -> bool:
    return availability() is None


def check(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why an ``[n, k]`` weight with ``dtype`` activations is not served here, or None if it is."""
    if dtype != torch.bfloat16:
        return f"activations have to be bfloat16, got {dtype}"
    return check_shape(n, k)


@functools.cache
def _prepare(device: int) -> int:
    """Loads the kernels on a device; returns its number of multiprocessors."""
    with torch.cuda.device(device):
        error = load_library().qerl_nvfp4_prepare()
        if error:
            raise RuntimeError(f"preparing the Hopper kernels failed with CUDA error {error}")
        return torch.cuda.get_device_properties(device).multi_processor_count


def initialize() -> None:
    """Compile if need be, and load, on the current device. Any first call does so; a CUDA graph capture should not."""
    reason = availability()
    if reason:
        raise RuntimeError(reason)
    _prepare(torch.cuda.current_device())


def run_plan(x, packed_p, scale_p, alpha, bias, plan: tuning.Plan, pdl: int = 1, out=None) -> torch.Tensor:
    """:func:`gemm` with ``x`` [M, K] and an explicit plan.

    ``pdl``: launch with programmatic dependent launch, so that a launch sets up and fetches its first weights (which no
    kernel writes) while the kernel before it drains; activations and results wait for that kernel's end.
    """
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    m = x.shape[0]
    if plan.config < 0:
        weight = dequantize(packed_p, scale_p)
        if bias is None:
            return torch.addmm(x.new_empty(n), x, weight.t(), beta=0, alpha=alpha)
        return torch.addmm(bias, x, weight.t(), alpha=alpha)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device) if out is None else out
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=x.device) if plan.workspace else None
    stream = torch.cuda.current_stream(x.device).cuda_stream
    slot = _slots.setdefault((x.device.index, stream), len(_slots) % _COUNTER_SLOTS)
    error = load_library().qerl_nvfp4_gemm(
        x.data_ptr(), packed_p.data_ptr(), scale_p.data_ptr(), alpha, None if bias is None else bias.data_ptr(), y.data_ptr(),
        m, n, k, plan.config, plan.blocks, plan.cluster, None if workspace is None else workspace.data_ptr(), slot, pdl, stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"the NVFP4 kernel failed with error {error} for M, N, K = {m}, {n}, {k} and {plan}")
    return y


def _gemm_cuda(x, packed_p, scale_p, alpha, bias=None):
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    if x.dtype != torch.bfloat16 or x.shape[-1] != k:
        raise ValueError(f"x has to be bfloat16 [..., {k}], got {x.dtype} {tuple(x.shape)}")
    rows = x.reshape(-1, k).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan = tuning.choose(rows.shape[0], n, k, _prepare(x.device.index))
    return run_plan(rows, packed_p, scale_p, alpha, bias, plan).view(*x.shape[:-1], n)


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
library.define("qerl_hopper::nvfp4_dequantize", "(Tensor packed_p, Tensor scale_p) -> Tensor")
library.impl("qerl_hopper::nvfp4_gemm", "CUDA", _gemm_cuda)
library.impl("qerl_hopper::nvfp4_dequantize", "CUDA", _dequantize_cuda)


@library.register_fake("qerl_hopper::nvfp4_gemm")
def _(x, packed_p, scale_p, alpha, bias=None):
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


def dequantize(packed_p: torch.Tensor, scale_p: torch.Tensor) -> torch.Tensor:
    """``[N, K]`` bfloat16, exactly ``e2m1 * scale``, from :func:`prepack`'s tensors."""
    return torch.ops.qerl_hopper.nvfp4_dequantize(packed_p, scale_p)
