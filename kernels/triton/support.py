"""Tells what the Triton kernels run on and serve. Each function returns a reason against it, or
None."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

MIN_CAPABILITY = (8, 0)
"""The least compute capability that Triton compiles for and that multiplies bfloat16."""

LORA_UNIT = 16
"""The rank of an adapter that the GEMM computes is a multiple of this."""


@functools.cache
def _triton_problem() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:  # an installation for another system raises more than ImportError
        return f"Triton cannot be imported ({type(error).__name__}: {error})."
    return None


def interpreted() -> bool:
    """Returns whether TRITON_INTERPRET is set, so that kernels run on a CPU in Triton's
    interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported_device(device: int | None = None) -> str | None:
    """Returns why the kernels cannot run on CUDA device ``device``, or None.

    Triton needs a C compiler for what launches a kernel (triton/runtime/build.py) and fails at the
    first call without one. So this decodes one block, once in a process for each device. Triton's
    interpreter needs no device.

    Args:
        device: CUDA device number; None is the current device.
    """
    if (reason := _unsupported_capability(device)) or interpreted():
        return reason
    return _compile_problem(torch.cuda.current_device() if device is None else device)


def _unsupported_capability(device: int | None = None) -> str | None:
    """Returns the part of :func:`unsupported_device` that compiles nothing."""
    reason = _triton_problem()
    if reason or interpreted():
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


@functools.cache
def _compile_problem(device: int) -> str | None:
    from qerl_verl.kernels.triton.ops import block_values

    try:
        with torch.cuda.device(device):
            block_values(
                torch.zeros(1, 8, dtype=torch.uint8, device="cuda"), torch.zeros(1, 1, dtype=torch.uint8, device="cuda")
            )
    except Exception as error:  # of Triton, of the compiler, of the file system: all mean that no kernel runs
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"Triton compiles nothing here: {lines[-1] if lines else type(error).__name__}"
    return None


def require(tensor: torch.Tensor) -> None:
    """Raises a RuntimeError with the reason if no kernel can run on the tensor's device."""
    device = tensor.device
    reason = _unsupported_capability(device.index if device.type == "cuda" else None)
    if reason is None and device.type != "cuda" and not interpreted():
        reason = f"The kernels need tensors on a CUDA device, got {device}."
    if reason:
        raise RuntimeError(f"The NVFP4 kernels in Triton cannot run. {reason}")


def unsupported_weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Returns why the GEMM does not support an ``[n, k]`` weight with ``dtype`` activations, or
    None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations have to be bfloat16 or float16, got {dtype}"
    if k % 64 or k <= 0:
        return f"K has to be a multiple of 64, got {k}"
    return None


def unsupported_adapter(n: int, k: int, rank: int, ends: Sequence[int]) -> str | None:
    """Returns why the GEMM of an ``[n, k]`` weight does not compute an adapter along with it, or
    None.

    Args:
        rank: of each projection's adapter.
        ends: the row at which each fused projection ends.
    """
    if len(ends) > 1:
        return f"the kernel computes the adapter of one projection, got {len(ends)}"
    return f"the rank has to be a multiple of {LORA_UNIT}, got {rank}" if rank % LORA_UNIT else None


def unsupported_experts(hidden: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Returns why the grouped GEMMs do not support experts of ``inner`` channels, or None."""
    return unsupported_weight(inner, hidden, dtype) or unsupported_weight(hidden, inner, dtype)


def padded_expert_rank(rank: int) -> int:
    """Returns the rank that the buffers of an adapter on experts have, padded with zeros: a
    power of two from 16 on."""
    return max(16, 1 << (rank - 1).bit_length())
