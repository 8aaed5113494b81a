"""Defines the quantization methods, and implements those that need only the weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qerl_verl.kernels.mxfp4_quantize import mxfp4_global_scale, quantize_mxfp4
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_quantize import (
    E4M3_MAX,
    FOUR_OVER_SIX_SCALE_MAX,
    nvfp4_global_scale,
    quantize_nvfp4,
    quantize_nvfp4_four_over_six,
)

Method = Literal["rtn", "four-over-six", "gptq", "mxfp4"]
"""How weights are rounded.

``rtn`` rounds to the nearest value. ``four-over-six`` also chooses the better of two scales for
each block (arXiv 2512.02010). ``gptq`` minimizes the change of the layer's outputs on a calibration
text (arXiv 2210.17323). ``mxfp4`` is another format, with one power of two for 32 values, in the
container of NVFP4 (OCP Microscaling Formats v1.0).
"""

METHODS: tuple[str, ...] = get_args(Method)
NEEDS_CALIBRATION = ("gptq",)

_SLAB_ELEMENTS = 1 << 20  # elements of a weight that one thread quantizes at a time
_CHUNK_ELEMENTS = (1 << 17, 1 << 24)  # elements that are decoded at a time, on a CPU and on a GPU


@dataclass(frozen=True)
class SquaredError:
    """Squared error and squared magnitude of a linear, summed over all elements.

    Attributes:
        weight_error, weight: sums for the weight.
        output_error, output: sums for the layer's outputs on the calibration text; None without
            one.
    """

    weight_error: float
    weight: float
    output_error: float | None = None
    output: float | None = None


@dataclass(frozen=True)
class PackedLinear:
    """A linear in the format of the checkpoint.

    Attributes:
        packed: ``[N, K / 2]`` uint8.
        scale: ``[N, K / 16]`` float8_e4m3fn.
        global_scale: ``[1]`` float32.
        error: the error against the source weight.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor
    error: SquaredError


def shared_global_scale(amax: Iterable[torch.Tensor], method: str) -> torch.Tensor:
    """Returns one global scale, ``[1]`` float32, for linears that are fused.

    GPTQ starts from the block scales of four-over-six.

    Args:
        amax: the largest magnitude of each linear, 0-d float32.
        method: see :data:`Method`.
    """
    if method == "mxfp4":
        return mxfp4_global_scale(torch.stack(list(amax)).max())
    largest = E4M3_MAX if method == "rtn" else FOUR_OVER_SIX_SCALE_MAX
    return nvfp4_global_scale(torch.stack(list(amax)).max(), largest)


def round_weight(
    weight: torch.Tensor, global_scale: torch.Tensor, method: str, pool: Executor | None = None
) -> PackedLinear:
    """Quantizes a weight by ``rtn``, ``four-over-six`` or ``mxfp4``.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16, finite; K is a multiple of 16, or of 32 for
            ``mxfp4``.
        global_scale: see :func:`shared_global_scale`.
        pool: threads that share the work, for a weight on the CPU.

    Returns:
        Tensors on the CPU.

    Raises:
        ValueError: with ``mxfp4``, the shared exponents of the weight exceed the container's span.
    """
    function = _FUNCTIONS[method]
    rows = max(1, _SLAB_ELEMENTS // weight.shape[1]) if pool is not None else len(weight)

    def work(slab: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        packed, scale = function(slab, global_scale)
        return packed, scale, *squared_error(slab, packed, scale, global_scale)

    results = (pool.map if pool is not None else map)(work, weight.split(rows))
    packed, scale, error, square = zip(*results, strict=True)
    return PackedLinear(
        torch.cat(packed).cpu(),
        torch.cat([s.view(torch.uint8) for s in scale]).view(torch.float8_e4m3fn).cpu(),
        global_scale.cpu(),
        SquaredError(torch.stack(error).sum().item(), torch.stack(square).sum().item()),
    )


_FUNCTIONS = {"rtn": quantize_nvfp4, "four-over-six": quantize_nvfp4_four_over_six, "mxfp4": quantize_mxfp4}


def squared_error(
    weight: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums of the squared error and of the squared weight, each 0-d float64.

    Args:
        weight: ``[N, K]`` in any floating-point dtype.
        packed, scale, global_scale: the quantized weight, see :class:`PackedLinear`.
    """
    rows = max(1, _CHUNK_ELEMENTS[weight.is_cuda] // weight.shape[1])
    error, square = [], []
    for w, p, s in zip(weight.split(rows), packed.split(rows), scale.split(rows), strict=True):
        w = w.float()
        square.append(w.square().sum(dtype=torch.float64))
        error.append(
            dequantize_nvfp4(p, s, global_scale.to(w.device), torch.float32).sub_(w).square_().sum(dtype=torch.float64)
        )
    return torch.stack(error).sum(), torch.stack(square).sum()


def tensors_of(linears: Mapping[str, PackedLinear]) -> dict[str, torch.Tensor]:
    """Returns name -> tensor, with the names of a checkpoint.

    Args:
        linears: full name of a linear -> its tensors.
    """
    return {
        f"{name}.weight_{part}": tensor
        for name, linear in linears.items()
        for part, tensor in (("global_scale", linear.global_scale), ("packed", linear.packed), ("scale", linear.scale))
    }
