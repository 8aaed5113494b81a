"""Decodes NVFP4 weights: ``w = e2m1 * block_scale / global_scale``.

:func:`dequantize_nvfp4` returns the weight ``w``, and :func:`block_values_nvfp4` returns it without
the global scale. In this package "dequantize" always includes the global scale, and "decode" is the
word for block values.

Layout (compressed-tensors ``nvfp4-pack-quantized``): two E2M1 codes a byte, the even input channel
in the low nibble; one E4M3 scale per 16 consecutive input channels; one FP32 divisor per tensor.

An E2M1 value times an E4M3 scale needs at most 6 significant bits, so ``block_values_nvfp4`` is
exact in bfloat16 (and in float16 up to its exponent range). The FP32 divisor is not, which is why a
GEMM applies it to its accumulator (:func:`qerl_verl.kernels.nvfp4_linear.nvfp4_linear`)
and never to the weight.
"""

from __future__ import annotations

import functools

import torch

BLOCK_SIZE = 16
"""Input channels that share one E4M3 scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the eight E2M1 codes. Bit 3 of a code is the sign."""


@functools.cache
def _byte_table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``[256, 2]``: the two E2M1 values of each packed byte, low nibble first."""
    code = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=dtype)
    byte = torch.arange(256)
    return torch.stack((code[byte & 0xF], code[byte >> 4]), dim=-1).to(device)


def block_values_nvfp4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``e2m1 * block_scale``: the weight without its per-tensor divisor.

    Args:
        packed: ``[N, K / 2]`` uint8.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8.
        dtype: bfloat16, float16, float32 or float64. Exact in all of them but float16, where a
            value below 2**-24 rounds to zero (none is beyond 6 * 448 = 2688).

    Returns:
        ``[N, K]`` in ``dtype``.

    Raises:
        ValueError: the shapes do not belong together.
    """
    n, half_k = packed.shape
    if scale.shape != (n, half_k * 2 // BLOCK_SIZE) or half_k * 2 % BLOCK_SIZE:
        raise ValueError(
            f"packed {tuple(packed.shape)} holds {half_k * 2} input channels, which need scales of "
            f"shape ({n}, {half_k * 2 // BLOCK_SIZE}) and a multiple of {BLOCK_SIZE}; got "
            f"{tuple(scale.shape)}"
        )
    scale = scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale
    values = _byte_table(packed.device, dtype)[packed.int()]  # [N, K/2, 2]
    return (values.view(n, -1, BLOCK_SIZE) * scale.to(dtype).unsqueeze(-1)).view(n, half_k * 2)


def dequantize_nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Returns the weight itself, ``e2m1 * scale / global_scale``, divided in float32 (float64 for
    float64) and rounded to ``dtype``.

    Args:
        packed, scale: see :func:`block_values_nvfp4`.
        global_scale: one float32, the divisor that compressed-tensors stores as
            ``weight_global_scale``.

    Returns:
        ``[N, K]`` in ``dtype``.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (block_values_nvfp4(packed, scale, wide) / global_scale.to(wide)).to(dtype)
