"""Quantize a weight to NVFP4: ``w ~= e2m1 * block_scale / global_scale``.

The convention, down to ties and zeros, is that of compressed-tensors 0.17 (``nvfp4-pack-quantized``), so that for
the same global scale the bytes are the ones it writes:

    global_scale = 448 * 6 / max|w|                      of the tensor, or of all tensors that are fused into one
    block_scale  = e4m3(global_scale * (max|w| / 6))     of 16 consecutive input channels; 0.125 where that is zero
    code         = e2m1(w / (block_scale / global_scale))

Both roundings are to nearest, ties to even. A value that is negative and rounds to zero keeps its sign (code 8).
"""

from __future__ import annotations

import torch

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE, E2M1_VALUES

E2M1_MAX = E2M1_VALUES[-1]
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
ZERO_BLOCK_SCALE = torch.finfo(torch.float8_e4m3fn).eps
"""Scale of a block whose own scale rounds to zero."""

_CHUNK_ELEMENTS = 1 << 18  # temporaries stay in cache, and enough work for eight threads


def nvfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """The per-tensor divisor, ``448 * 6 / amax``: the largest block scale becomes 448.

    As ``generate_gparam`` in ``compressed_tensors/quantization/utils/helpers.py`` computes it from float32 ranges.

    Args:
        amax: one finite value >= 0, the largest magnitude of the weight or of all weights that share the scale.

    Returns:
        ``[1]`` float32. 1.0 where ``amax`` is zero or so small that the quotient exceeds float32 (below 7.9e-36).

    Raises:
        ValueError: ``amax`` is not one value, is negative, or is not finite.
    """
    if amax.numel() != 1 or not torch.isfinite(amax).item() or amax.item() < 0:
        raise ValueError(f"amax must be one finite value >= 0, got {amax.tolist()}")
    scale = E4M3_MAX * E2M1_MAX / amax.float().reshape(1)
    return torch.where(torch.isfinite(scale), scale, 1.0)


def quantize_nvfp4(weight: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round ``weight`` to NVFP4 under a given global scale.

    As ``calculate_qparams`` (``quantization/utils/helpers.py``), ``quantize`` (``quantization/lifecycle/forward.py``)
    and ``pack_fp4_to_uint8`` (``compressors/nvfp4/helpers.py``) of compressed-tensors do it on a CPU; the quotient
    ``max|w| / 6`` is rounded to the dtype of the weight there, and so it is here. Temporaries take about 5 MiB.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16, finite, K a multiple of 16.
        global_scale: one float32, see :func:`nvfp4_global_scale`.

    Returns:
        ``packed`` ``[N, K / 2]`` uint8, the even input channel in the low nibble, and
        ``scale`` ``[N, K / 16]`` float8_e4m3fn.

    Raises:
        ValueError: a shape or dtype other than the above.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE:
        raise ValueError(f"weight must be [N, K] with K a multiple of {BLOCK_SIZE}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if global_scale.numel() != 1 or global_scale.dtype != torch.float32:
        raise ValueError(f"global_scale must be one float32, got {global_scale.dtype} {tuple(global_scale.shape)}")

    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, k // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    global_scale = global_scale.to(weight.device).reshape(1)
    six = torch.tensor(E2M1_MAX, dtype=weight.dtype, device=weight.device)  # a Python 6.0 multiplies by 1/6 on CUDA
    rows = max(1, _CHUNK_ELEMENTS // k)
    for start in range(0, n, rows):
        blocks = weight[start : start + rows].reshape(-1, BLOCK_SIZE)
        block_scale = (blocks.abs().amax(-1) / six).float() * global_scale
        block_scale = block_scale.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        block_scale[block_scale == 0] = ZERO_BLOCK_SCALE
        scaled = blocks.float() / (block_scale / global_scale).unsqueeze(-1)
        packed[start : start + rows] = _pack(_e2m1_codes(scaled)).view(-1, k // 2)
        scale[start : start + rows] = block_scale.view(-1, k // BLOCK_SIZE)  # exact
    return packed, scale


def _e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """The E2M1 codes nearest to float32 ``x``, ties to even, in uint8.

    The codes 0-4 are equidistant in x, with step 1/2; 4-6 have step 1; 6-7 have step 2. Each term below is the code as
    if its step held everywhere, and the smallest is right.
    """
    a = x.abs().clamp_(max=E2M1_MAX)
    code = torch.round(a * 2)
    code = torch.minimum(code, torch.round(a).add_(2))
    code = torch.minimum(code, torch.round(a * 0.5).add_(4))
    return code.to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the low nibble."""
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4
