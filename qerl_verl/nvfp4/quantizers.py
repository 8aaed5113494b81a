"""The methods that turn a weight into NVFP4, and the ones among them that need nothing but the
weight."""

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
"""``rtn`` rounds to the nearest value. ``four-over-six`` does the same with the better of two
scales a block (arXiv 2512.02010). ``gptq`` rounds so that the outputs of the layer change least on
a calibration text (arXiv 2210.17323). ``mxfp4`` is another format, one power of two for 32 values,
in the container of NVFP4 (OCP Microscaling Formats v1.0)."""

METHODS: tuple[str, ...] = get_args(Method)
NEEDS_CALIBRATION = ("gptq",)

_SLAB_ELEMENTS = 1 << 20  # of a weight, what one thread quantizes at a time
_CHUNK_ELEMENTS = (1 << 17, 1 << 24)  # decoded at a time, on a CPU and on a GPU


@dataclass(frozen=True)
class SquaredError:
    """Sums over the elements of a linear: of the squared error and of the squares themselves.

    Attributes:
        weight_error, weight: of the weight.
        output_error, output: of the layer's outputs over the calibration text; None without one.
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
        error: against the weight that was quantized.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor
    error: SquaredError


def shared_global_scale(amax: Iterable[torch.Tensor], method: str) -> torch.Tensor:
    """Returns one global scale for linears that are fused, from the largest magnitude of each.

    GPTQ starts from the block scales of four-over-six.
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
        weight: ``[N, K]`` float32, bfloat16 or float16, finite, K a multiple of 16, of 32 for
            ``mxfp4``.
        global_scale: see :func:`shared_global_scale`.
        pool: threads that share the work, for a weight on the CPU.

    Returns:
        Tensors on the CPU.

    Raises:
        ValueError: ``mxfp4``, and the shared exponents of the weight are not all in the container's
            span.
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
    """Returns the sum of the squared error and sum of the squares of a weight, each one float64."""
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
    """Returns name -> tensor, named as in a checkpoint."""
    return {
        f"{name}.weight_{part}": tensor
        for name, linear in linears.items()
        for part, tensor in (("global_scale", linear.global_scale), ("packed", linear.packed), ("scale", linear.scale))
    }
