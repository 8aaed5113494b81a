"""Tells what the Hopper kernels run on and serve. Each function returns a reason against it, or
None."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qerl_verl.kernels.hopper import build
from qerl_verl.kernels.hopper.layout import LORA_UNIT, UNIT, unsupported_shape


def unsupported_device(device: int | None = None) -> str | None:
    """Returns why the kernels cannot run on CUDA device ``device``, in one line, or None.

    Compiles the kernels if necessary, loads them and prepares the device, once in a process. None
    therefore means that they have been loaded. The cheap checks come first.

    Args:
        device: CUDA device number; None is the current device.
    """
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _unsupported_device(torch.cuda.current_device() if device is None else device)


@functools.cache
def _unsupported_device(device: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the kernels are for compute capability 9.0 (Hopper), this device has {major}.{minor}"
    if reason := build.problem():
        return reason
    try:
        prepare(device)
    except RuntimeError as error:
        return build.last_line(str(error))
    return None


@functools.cache
def prepare(device: int) -> int:
    """Loads the kernels on a device and returns its number of multiprocessors.

    Raises:
        RuntimeError: CUDA does not load them, or they cannot be compiled.
    """
    with torch.cuda.device(device):
        library = build.load_library()
        error = library.qerl_nvfp4_prepare()
        if error:
            raise RuntimeError(
                f"preparing the Hopper kernels failed with CUDA error {error} ({library.qerl_cuda_error(error).decode()})"
            )
        return torch.cuda.get_device_properties(device).multi_processor_count


def unsupported_weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """Returns why an ``[n, k]`` weight with ``dtype`` activations is not supported, or None."""
    if dtype != torch.bfloat16:
        return f"activations have to be bfloat16, got {dtype}"
    return unsupported_shape(n, k)


def unsupported_adapter(n: int, k: int, rank: int, ends: Sequence[int]) -> str | None:
    """Returns why the GEMM of an ``[n, k]`` weight does not compute an adapter along with it, or
    None.

    Args:
        rank: rank of each projection's adapter.
        ends: the row at which each fused projection ends.
    """
    if rank % LORA_UNIT or rank < LORA_UNIT:
        return f"the rank has to be a multiple of {LORA_UNIT}, got {rank}"
    if not 1 <= len(ends) <= 3 or list(ends) != sorted(ends) or ends[-1] != n:
        return f"one to three projections that end at row {n} are possible, got {list(ends)}"
    if len(ends) > 1 and any(end % (2 * UNIT) for end in ends):
        return f"projections have to end at multiples of {2 * UNIT} rows, got {list(ends)}"
    return None
