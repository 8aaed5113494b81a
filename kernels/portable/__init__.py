"""NVFP4 weights in Triton, for every NVIDIA GPU from Ampere on: quantize, dequantize, and the matrix product.

The weights are in the layout of the checkpoint (compressed-tensors ``nvfp4-pack-quantized``), so nothing has to be
repacked: ``packed`` ``[N, K / 2]`` uint8, two E2M1 codes a byte, the even input channel in the low nibble; ``scale``
``[N, K / 16]`` E4M3; and one divisor for the tensor, ``weight_global_scale``.

The functions are registered with PyTorch as ``torch.ops.qerl_portable.nvfp4_dequantize``, ``nvfp4_quantize`` and
``nvfp4_gemm``, with shapes for torch.compile. They never synchronize and run on the current stream of the tensors'
device. Triton compiles a kernel on its first call for a dtype and tile, so call each once before capturing a CUDA
graph. No autograd: the training layer calls :func:`dequantize` for its backward pass.

:func:`tune` measures how :func:`gemm` is launched for a weight shape; without it a built-in table decides. The FP8
functions serve benchmarks, see ``kernels/nvfp4_fp8_linear.py``.

Importing this package needs PyTorch only. Without Triton or a GPU, :func:`availability` says so and every function raises
a RuntimeError. With TRITON_INTERPRET=1 set before Triton is imported, they run on a CPU in Triton's interpreter,
slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import library

from .. import autotune
from ..device_guard import on_tensors_device
from ..nvfp4_dequantize import BLOCK_SIZE
from ..nvfp4_experts import ExpertStack
from .tuning import Plan, choose

__all__ = [
    "Plan", "availability", "check", "check_experts", "check_fp8", "choose", "dequantize", "experts", "fp8_availability", "fp8_gemm", "fp8_quantize",
    "gemm", "is_available", "nvfp4_through_fp8", "nvfp4_to_fp8", "quantize", "trial", "tune",
    "warm_up_experts",
]  # fmt: skip

MIN_CAPABILITY = (8, 0)
"""The least compute capability that Triton compiles for and that multiplies bfloat16."""


@functools.cache
def _triton_problem() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # an installation for another system raises more than ImportError
        return f"Triton cannot be imported ({type(error).__name__}: {error})."
    return None


MIN_FP8_CAPABILITY = (8, 9)
"""The least compute capability that multiplies FP8 (Ada)."""

FAST_ACCUMULATION = False
"""Whether an FP8 GEMM keeps its sums in the tensor cores' own accumulators, which are narrower than float32."""


def _interpreter() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def availability(device: int | None = None) -> str | None:
    """Why the kernels cannot run on CUDA device ``device`` (default: the current one), a sentence, or None if they can.

    Triton's interpreter (TRITON_INTERPRET=1) needs no device.
    """
    reason = _triton_problem()
    if reason or _interpreter():
        return reason
    if not torch.cuda.is_available():
        return "There is no CUDA device, and TRITON_INTERPRET=1 is not set."
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < MIN_CAPABILITY:
        return (
            "The kernels are for NVIDIA GPUs of compute capability {}.{} (Ampere) or later, ".format(*MIN_CAPABILITY)
            + f"this device is {torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})."
        )
    return None


def is_available(device: int | None = None) -> bool:
    """Whether :func:`availability` has nothing to say."""
    return availability(device) is None


def trial(device: int | None = None) -> str | None:
    """:func:`availability`, and whether Triton compiles here: why not, one line, or None.

    Triton needs a C compiler for what launches a kernel (triton/runtime/build.py) and fails at the
    first call without one. So one block is unpacked, once in a process for a device.
    """
    if (reason := availability(device)) or _interpreter():
        return reason
    return _trial(torch.cuda.current_device() if device is None else device)


@functools.cache
def _trial(device: int) -> str | None:
    try:
        with torch.cuda.device(device):
            dequantize(
                torch.zeros(1, 8, dtype=torch.uint8, device="cuda"), torch.zeros(1, 1, dtype=torch.uint8, device="cuda")
            )
    except Exception as error:  # of Triton, of the compiler, of the file system: all mean that no kernel runs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"Triton compiles nothing here: {lines[-1] if lines else type(error).__name__}"
    return None


def fp8_availability(device: int | None = None) -> str | None:
    """Why the FP8 kernels cannot run on CUDA device ``device`` (default: the current one), one line, or None.

    Multiplies one tile, once in a process for a device.
    """
    if reason := trial(device):
        return reason
    return None if _interpreter() else _fp8_trial(torch.cuda.current_device() if device is None else device)


@functools.cache
def _fp8_trial(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_FP8_CAPABILITY:
        return (
            "FP8 needs compute capability {}.{} (Ada) or later, ".format(*MIN_FP8_CAPABILITY)
            + f"this device is {torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
        )
    try:
        one = torch.zeros(64, 64, dtype=torch.float8_e4m3fn, device=torch.device("cuda", device))
        scales = torch.ones(64, 1, device=one.device)
        torch._scaled_mm(one, one.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"PyTorch multiplies no FP8 with scales by row here: {str(error).strip().splitlines()[0]}"
    return None


def check_fp8(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why :func:`fp8_gemm` does not serve an ``[n, k]`` weight with ``dtype`` activations, or None if it does."""
    if dtype != torch.bfloat16:
        return f"activations have to be bfloat16, got {dtype}"
    return f"N and K have to be multiples of 16, got {n} x {k}" if n % 16 or k % 16 else None


def check(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why :func:`gemm` does not serve an ``[n, k]`` weight with ``dtype`` activations, or None if it does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations have to be bfloat16 or float16, got {dtype}"
    if k % 64 or k <= 0:
        return f"K has to be a multiple of 64, got {k}"
    return None


def check_experts(hidden: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Why :func:`experts` does not serve experts of ``inner`` channels, or None if it does."""
    return check(inner, hidden, dtype) or check(hidden, inner, dtype)


def tune(device: torch.device, n: int, k: int) -> str | None:
    """Measure the launch configurations of an ``[n, k]`` weight, unless the cache has them, and use the fastest.

    A temporary 16-bit weight and torch.addmm are among the candidates, so they are the choice where no kernel
    of ours is faster.

    Args:
        device: a CUDA device.
        n: rows of the weight.
        k: columns, a multiple of 64.

    Returns:
        A sentence that says what was measured, or why the built-in table stays in use; None if neither.
    """
    if not autotune.enabled() or _interpreter():
        return None
    from . import measure

    with torch.cuda.device(device):
        return measure.tune(n, k)


def _require(tensor: torch.Tensor) -> None:
    """Raises what stands in the way of a launch on the tensor's device."""
    device = tensor.device
    reason = availability(device.index if device.type == "cuda" else None)
    if reason is None and device.type != "cuda" and not _interpreter():
        reason = f"The kernels need tensors on a CUDA device, got {device}."
    if reason:
        raise RuntimeError(f"The portable NVFP4 kernels cannot run. {reason}")


def _check_weight(packed: torch.Tensor, scale: torch.Tensor) -> None:
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"packed has to be uint8 [N, K / 2], got {packed.dtype} {tuple(packed.shape)}")
    n, k = packed.shape[0], packed.shape[1] * 2
    if scale.shape != (n, k // BLOCK_SIZE) or k % BLOCK_SIZE:
        raise ValueError(
            f"packed {tuple(packed.shape)} holds {k} input channels, which need scales of shape ({n}, {k // BLOCK_SIZE}) "
            f"and a multiple of {BLOCK_SIZE}; got {tuple(scale.shape)}"
        )
    if scale.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(f"scale has to be float8_e4m3fn, or the same bytes as uint8, got {scale.dtype}")


def _dequantize(packed, scale, dtype, transposed=False):
    _check_weight(packed, scale)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype has to be bfloat16 or float16, got {dtype}")
    _require(packed)
    from .nvfp4_dequantize import nvfp4_dequantize

    return nvfp4_dequantize(packed, scale, dtype, transposed)


def _quantize(weight, global_scale):
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE:
        raise ValueError(f"weight must be [N, K] with K a multiple of {BLOCK_SIZE}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if global_scale.numel() != 1 or global_scale.dtype != torch.float32:
        raise ValueError(f"global_scale must be one float32, got {global_scale.dtype} {tuple(global_scale.shape)}")
    _require(weight)
    from .nvfp4_quantize import nvfp4_quantize

    return nvfp4_quantize(weight, global_scale)


def _gemm(x, packed, scale, alpha, bias=None, u=None, lora_b=None):
    _check_weight(packed, scale)
    n, k = packed.shape[0], packed.shape[1] * 2
    reason = check(n, k, x.dtype)
    if reason:
        raise ValueError(reason)
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has to be [..., {k}], got {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has to be [{n}], got {tuple(bias.shape)}")
    if (u is None) != (lora_b is None):
        raise ValueError("u and lora_b have to be given together")
    if u is not None:
        rank = u.shape[-1] if u.ndim else 0
        if u.shape[:-1] != x.shape[:-1] or rank % 16 or rank == 0 or lora_b.shape != (n, rank):
            raise ValueError(
                f"u has to be {(*x.shape[:-1], 'R')} and lora_b ({n}, R), R a multiple of 16; "
                f"got {tuple(u.shape)} and {tuple(lora_b.shape)}"
            )
        if u.dtype != x.dtype or lora_b.dtype != x.dtype:
            raise ValueError(f"u and lora_b have to be {x.dtype} as x is, got {u.dtype} and {lora_b.dtype}")
    _require(x)
    from .nvfp4_gemm import nvfp4_gemm

    return nvfp4_gemm(x, packed, scale, alpha, bias, u, lora_b)


def _require_fp8(tensor: torch.Tensor) -> None:
    _require(tensor)
    if not _interpreter() and (reason := fp8_availability(tensor.device.index)):
        raise RuntimeError(f"The FP8 kernels cannot run. {reason}")


def _fp8_quantize(x, factor=1.0):
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x has to be bfloat16, float16 or float32 [M, K], got {x.dtype} {tuple(x.shape)}")
    _require_fp8(x)
    from .fp8 import quantize_rows

    return quantize_rows(x, factor)


def _nvfp4_to_fp8(packed, scale):
    _check_weight(packed, scale)
    _require_fp8(packed)
    from .fp8 import nvfp4_to_fp8

    return nvfp4_to_fp8(packed, scale.view(torch.uint8), torch.float8_e4m3fn)


def _nvfp4_through_fp8(packed, scale):
    _check_weight(packed, scale)
    _require_fp8(packed)
    from .fp8 import nvfp4_to_fp8

    return nvfp4_to_fp8(packed, scale.view(torch.uint8), torch.bfloat16)[0]


def _fp8_gemm(x, weight, weight_scale, alpha, bias=None):
    n, k = weight.shape
    if x.shape[-1] != k or x.dtype != torch.bfloat16:
        raise ValueError(f"x has to be bfloat16 [..., {k}], got {x.dtype} {tuple(x.shape)}")
    if weight.dtype != torch.float8_e4m3fn or weight_scale.shape != (n,) or (bias is not None and bias.shape != (n,)):
        raise ValueError(
            f"weight has to be float8_e4m3fn [N, K], weight_scale [N] and bias [N] or None, got {weight.dtype} "
            f"{tuple(weight.shape)}, {tuple(weight_scale.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    rows = x.reshape(-1, k)
    if rows.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], n))
    _require_fp8(x)
    from .fp8 import quantize_rows

    codes, scale = quantize_rows(rows, alpha)
    y = torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale.unsqueeze(1),
        scale_b=weight_scale.unsqueeze(0),
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return y.view(*x.shape[:-1], n)


library.define(
    "qerl_portable::nvfp4_dequantize",
    "(Tensor packed, Tensor scale, ScalarType dtype, bool transposed=False) -> Tensor",
)
library.define("qerl_portable::nvfp4_quantize", "(Tensor weight, Tensor global_scale) -> (Tensor, Tensor)")
library.define(
    "qerl_portable::nvfp4_gemm",
    "(Tensor x, Tensor packed, Tensor scale, float alpha, Tensor? bias=None, Tensor? u=None, Tensor? lora_b=None) -> Tensor",
)
library.define("qerl_portable::fp8_quantize", "(Tensor x, float factor=1.0) -> (Tensor, Tensor)")
library.define("qerl_portable::nvfp4_to_fp8", "(Tensor packed, Tensor scale) -> (Tensor, Tensor)")
library.define("qerl_portable::nvfp4_through_fp8", "(Tensor packed, Tensor scale) -> Tensor")
library.define(
    "qerl_portable::fp8_gemm",
    "(Tensor x, Tensor weight, Tensor weight_scale, float alpha, Tensor? bias=None) -> Tensor",
)
OPERATORS = {
    "fp8_quantize": on_tensors_device(_fp8_quantize),
    "nvfp4_to_fp8": on_tensors_device(_nvfp4_to_fp8),
    "nvfp4_through_fp8": on_tensors_device(_nvfp4_through_fp8),
    "fp8_gemm": on_tensors_device(_fp8_gemm),
    "nvfp4_dequantize": on_tensors_device(_dequantize),
    "nvfp4_quantize": on_tensors_device(_quantize),
    "nvfp4_gemm": on_tensors_device(_gemm),
}
"""What each operator of ``torch.ops.qerl_portable`` runs."""

for _name, _function in OPERATORS.items():
    library.impl(f"qerl_portable::{_name}", ("cpu", "cuda"), _function)


@library.register_fake("qerl_portable::nvfp4_dequantize")
def _(packed, scale, dtype, transposed=False):
    n, k = packed.shape[0], packed.shape[1] * 2
    return packed.new_empty((k, n) if transposed else (n, k), dtype=dtype)


@library.register_fake("qerl_portable::nvfp4_quantize")
def _(weight, global_scale):
    n, k = weight.shape
    packed = weight.new_empty((n, k // 2), dtype=torch.uint8)
    return packed, weight.new_empty((n, k // BLOCK_SIZE), dtype=torch.float8_e4m3fn)


@library.register_fake("qerl_portable::fp8_quantize")
def _(x, factor=1.0):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:1], dtype=torch.float32)


@library.register_fake("qerl_portable::nvfp4_to_fp8")
def _(packed, scale):
    n, k = packed.shape[0], packed.shape[1] * 2
    return packed.new_empty((n, k), dtype=torch.float8_e4m3fn), packed.new_empty(n, dtype=torch.float32)


@library.register_fake("qerl_portable::nvfp4_through_fp8")
def _(packed, scale):
    return packed.new_empty((packed.shape[0], packed.shape[1] * 2), dtype=torch.bfloat16)


@library.register_fake("qerl_portable::fp8_gemm")
def _(x, weight, weight_scale, alpha, bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@library.register_fake("qerl_portable::nvfp4_gemm")
def _(x, packed, scale, alpha, bias=None, u=None, lora_b=None):
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16, transposed: bool = False
) -> torch.Tensor:
    """``e2m1 * scale``, exactly: the weight without its per-tensor divisor.

    Args:
        packed: ``[N, K / 2]`` uint8, K a multiple of 16.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8; finite, of either sign.
        dtype: bfloat16 or float16.
        transposed: write ``[K, N]``.

    Returns:
        ``[N, K]``, or ``[K, N]``, row-major, in ``dtype``.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: :func:`availability` has a reason, or the tensors are not on a CUDA device.
    """
    return torch.ops.qerl_portable.nvfp4_dequantize(packed, scale, dtype, transposed)


def quantize(weight: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weight`` to NVFP4 under a given global scale, to the bytes of ``quantize_nvfp4``.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16, finite, K a multiple of 16.
        global_scale: one float32 on the same device, see :func:`qerl_verl.kernels.nvfp4_quantize.nvfp4_global_scale`.

    Returns:
        ``packed`` ``[N, K / 2]`` uint8 and ``scale`` ``[N, K / 16]`` float8_e4m3fn.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: :func:`availability` has a reason, or the tensors are not on a CUDA device.
    """
    return torch.ops.qerl_portable.nvfp4_quantize(weight, global_scale)


def gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    alpha: float,
    bias: torch.Tensor | None = None,
    u: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
) -> torch.Tensor:
    """``alpha * x (e2m1 * scale)^T + bias + u lora_b^T``, summed in float32.

    :func:`choose` tells the path. For many tokens it is a temporary weight in 16 bits and torch.addmm; then the LoRA term
    is added to a result already rounded to ``x.dtype``. Everywhere else the output is rounded once. The same call
    on the same kind of GPU sums in the same order each time.

    Args:
        x: ``[..., K]`` bfloat16 or float16, K a multiple of 64.
        packed: ``[N, K / 2]`` uint8.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8; finite, of either sign.
        alpha: 1 / ``weight_global_scale``, applied to the float32 accumulator of the first term.
        bias: ``[N]`` or None; taken in ``x.dtype``.
        u: ``[..., R]`` in ``x.dtype`` or None: ``x`` times the transposed LoRA A, with LoRA's scaling in it. R is a
            multiple of 16.
        lora_b: ``[N, R]`` in ``x.dtype``, given if ``u`` is.

    Returns:
        ``[..., N]`` in ``x.dtype``.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: :func:`availability` has a reason, or the tensors are not on a CUDA device.
    """
    return torch.ops.qerl_portable.nvfp4_gemm(x, packed, scale, alpha, bias, u, lora_b)


def fp8_quantize(x: torch.Tensor, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of activations to E4M3 under a power of two, as ``quantize_rows_reference`` does.

    Args:
        x: ``[M, K]`` bfloat16, float16 or float32.
        factor: multiplied into the second result.

    Returns:
        ``[M, K]`` float8_e4m3fn and ``[M]`` float32. A row that is not finite gets a scale of NaN, or codes of NaN.

    Raises:
        ValueError: another shape or dtype.
        RuntimeError: :func:`fp8_availability` has a reason.
    """
    return torch.ops.qerl_portable.fp8_quantize(x, factor)


def nvfp4_to_fp8(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An NVFP4 weight rounded to E4M3, as ``nvfp4_to_fp8_reference`` does it.

    Args:
        packed: ``[N, K / 2]`` uint8.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8; finite.

    Returns:
        ``[N, K]`` float8_e4m3fn and ``[N]`` float32, the power of two of each output channel.

    Raises:
        ValueError: shapes or dtypes other than the above.
        RuntimeError: :func:`fp8_availability` has a reason.
    """
    return torch.ops.qerl_portable.nvfp4_to_fp8(packed, scale)


def nvfp4_through_fp8(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``[N, K]`` bfloat16, the product of what :func:`nvfp4_to_fp8` returns, exactly."""
    return torch.ops.qerl_portable.nvfp4_through_fp8(packed, scale)


def fp8_gemm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, alpha: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``alpha * x' (weight * weight_scale)^T + bias``, ``x'`` being ``x`` rounded by :func:`fp8_quantize`.

    Args:
        x: ``[..., K]`` bfloat16.
        weight, weight_scale: from :func:`nvfp4_to_fp8`.
        alpha: 1 / ``weight_global_scale``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` bfloat16. No autograd.

    Raises:
        ValueError: other shapes or dtypes.
        RuntimeError: :func:`fp8_availability` has a reason.
    """
    return torch.ops.qerl_portable.fp8_gemm(x, weight, weight_scale, alpha, bias)


@on_tensors_device
def _experts(x, weights, chosen, *stacks):
    from .nvfp4_experts import nvfp4_experts

    return nvfp4_experts(x, weights, chosen, ExpertStack(*stacks[:3]), ExpertStack(*stacks[3:]))


def experts(
    x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, gate_up: ExpertStack, down: ExpertStack
) -> torch.Tensor:
    """What the chosen experts make of each token, see
    :func:`qerl_verl.kernels.nvfp4_experts.nvfp4_experts_reference`.

    Neither an operator nor differentiable: the rollout calls it behind an operator of the engine's.

    Args:
        x: ``[T, H]`` bfloat16 or float16, H a multiple of 64.
        weights: ``[T, k]``.
        chosen: ``[T, k]`` integers; negative ones add nothing.
        gate_up: ``[E, 2 I, ...]``, I a multiple of 64.
        down: ``[E, H, ...]``.

    Returns:
        ``[T, H]`` in ``x.dtype``. Between the GEMMs and before the sum, values are rounded to it.

    Raises:
        ValueError: shapes or dtypes other than the above, or tensors on several devices.
        RuntimeError: :func:`availability` has a reason, or the tensors are not on a CUDA device.
    """
    hidden, inner = x.shape[-1], down.packed.shape[2] * 2
    if reason := check_experts(hidden, inner, x.dtype):
        raise ValueError(reason)
    if x.ndim != 2 or weights.shape != chosen.shape or chosen.ndim != 2 or len(chosen) != len(x):
        raise ValueError(
            f"x has to be [T, H], weights and chosen [T, k], got {tuple(x.shape)}, {tuple(weights.shape)} and "
            f"{tuple(chosen.shape)}"
        )
    count = len(down.packed)
    for stack, n, k in ((gate_up, 2 * inner, hidden), (down, hidden, inner)):
        shapes = tuple(stack.packed.shape), tuple(stack.scale.shape), tuple(stack.alpha.shape)
        if shapes != ((count, n, k // 2), (count, n, k // BLOCK_SIZE), (count,)):
            raise ValueError(f"{count} experts of {n} x {k} need other shapes than {shapes}")
        if not (stack.packed.is_contiguous() and stack.scale.is_contiguous()):
            raise ValueError("packed values and scales of the experts have to be contiguous")
    _require(x)
    if len(x) == 0:
        return x.new_empty(x.shape)
    parts = [(s.packed, s.scale, s.alpha.float()) for s in (gate_up, down)]
    return _experts(x, weights, chosen, *parts[0], *parts[1])


def warm_up_experts(gate_up: ExpertStack, down: ExpertStack, top_k: int, dtype: torch.dtype) -> None:
    """Compile what :func:`experts` launches for these weights, whatever the number of tokens, since
    Triton compiles nothing while a CUDA graph is captured. Arguments as there."""
    _require(down.packed)
    from .nvfp4_experts import warm_up

    with torch.cuda.device(down.packed.device) if down.packed.is_cuda else contextlib.nullcontext():
        warm_up(gate_up, down, top_k, dtype)
