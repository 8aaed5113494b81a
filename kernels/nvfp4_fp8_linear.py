"""y = x' W'^T + b, with activations and an NVFP4 weight rounded to FP8: the reference, and what it defines.

    x'[t, :] = e4m3(x[t, :] / 2^p_t) 2^p_t              for each token t
    W'[n, :] = e4m3(e2m1 scale[n, :] / 2^q_n) 2^q_n     for each output channel n
    y        = alpha x' W'^T + b

e4m3 rounds to nearest, ties to even. 2^p_t and 2^q_n are the smallest powers of two under which a row stays within
E4M3's largest value, 448; for a weight the row's largest block scale times 6 stands for its largest value.

Powers of two make the definition independent of how it is computed:

* x' and W' are exact in bfloat16, so FP8 and bfloat16 tensor cores multiply the same numbers, for any number of tokens, and differ
  in the order and the width of sums alone;
* a value is rounded to four significant bits whatever stands beside it in its row, unless it is smaller than the row's largest
  by a factor of 2^14 and more. So a weight that tensor parallelism divides along K has the same W'.

The rounding of W moves those values alone whose E2M1 code has two significant bits (1.5, 3, 6) under a scale with more than E4M3
holds of the product, by at most 1/16 of the value. A weight with powers of two as scales (MXFP4) is not moved, where
its scales span at most 2^14 in a row.

The derivative of e4m3 counts as 1, so dy/dx = alpha W'.

No layer computes so: the rounding of activations widens the divergence between rollout and actor too much (docs/performance-trials.md,
"FP8 compute"). Benchmarks do.
"""

from __future__ import annotations

import torch

from qerl_verl.kernels.nvfp4_dequantize import E2M1_VALUES, block_values_nvfp4

E4M3_MAX = 448.0
_MANTISSA_OF_MAX = 0x600000  # of 448 = 1.75 * 2^8 in float32
_EXPONENT_OF_MAX = 8


def row_scales(amax: torch.Tensor) -> torch.Tensor:
    """The smallest powers of two by which magnitudes have to be divided to be at most 448.

    Args:
        amax: float32, >= 0.

    Returns:
        float32 of the same shape: at least 2^-126, so that the reciprocals are normal numbers; NaN for what is not finite.
    """
    bits = amax.contiguous().view(torch.int32)
    exponent = ((bits + (0x7FFFFF - _MANTISSA_OF_MAX)) >> 23) - _EXPONENT_OF_MAX  # biased; one more above 1.75 * 2^i
    scale = (exponent.clamp_min(1) << 23).view(torch.float32)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def quantize_rows_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to E4M3 under a power of two.

    Args:
        x: ``[M, K]`` bfloat16, float16 or float32.

    Returns:
        ``[M, K]`` float8_e4m3fn and ``[M]`` float32, the powers of two that the rows are to be multiplied by.
    """
    x = x.float()
    scale = row_scales(x.abs().amax(1)) if x.shape[1] else x.new_ones(x.shape[0])
    return (x * scale.reciprocal().unsqueeze(1)).to(torch.float8_e4m3fn), scale


def nvfp4_to_fp8_reference(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An NVFP4 weight rounded to E4M3 under a power of two for each output channel.

    Args:
        packed: ``[N, K / 2]`` uint8.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8; finite.

    Returns:
        ``[N, K]`` float8_e4m3fn and ``[N]`` float32: ``e2m1 * scale``, rounded, is their product.
    """
    block_scale = scale.view(torch.float8_e4m3fn) if scale.dtype == torch.uint8 else scale
    channel = row_scales(block_scale.float().abs().amax(1) * E2M1_VALUES[-1])
    values = block_values_nvfp4(packed, scale, torch.float32) * channel.reciprocal().unsqueeze(1)
    return values.to(torch.float8_e4m3fn), channel


def through_fp8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``quantized * scale`` by rows, exact in bfloat16, float32 and float64.

    Args:
        quantized: ``[M, K]`` float8_e4m3fn.
        scale: ``[M]`` float32, powers of two.
        dtype: of the result.
    """
    return quantized.to(dtype) * scale.to(dtype).unsqueeze(1)


def nvfp4_fp8_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    alpha: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``alpha * x' W'^T + bias``, by quantizing, dequantizing and a GEMM in ``x.dtype``.

    Args:
        x: ``[..., K]`` bfloat16, float32 or float64.
        weight, weight_scale: ``[N, K]`` and ``[N]`` from :func:`nvfp4_to_fp8_reference`.
        alpha: 1 / ``weight_global_scale``.
        bias: ``[N]`` or None.

    Returns:
        ``[..., N]`` in ``x.dtype``.
    """
    rows = through_fp8(*quantize_rows_reference(x.reshape(-1, x.shape[-1])), x.dtype)
    w = through_fp8(weight, weight_scale, x.dtype).t()
    start = x.new_empty(len(weight_scale)) if bias is None else bias.to(x.dtype)
    y = torch.addmm(start, rows, w, beta=0 if bias is None else 1, alpha=alpha)
    return y.view(*x.shape[:-1], len(weight_scale))
