"""Quantizes a weight to MXFP4 (OCP Microscaling Formats v1.0), stored in the container of NVFP4
without loss.

A block of 32 consecutive input channels shares one power of two, its values are E2M1:

    exponent = floor(log2(max|w|)) - 2          of a block; 2 is the exponent of E2M1's largest, 6
    code     = e2m1(w / 2^exponent)             to nearest, ties to even; above 6 it is 6

NVFP4 has an E4M3 scale for 16 values and a float32 divisor for the tensor,
``w = e2m1 * scale / global_scale``. With a power of two as the divisor, a block of 32 is two blocks
of 16 with the scale ``2^exponent * global_scale``. E4M3 holds the powers of two from 2^-9 to 2^8,
so that is exact where the exponents of a tensor span at most :data:`LARGEST_SPAN`.
"""

from __future__ import annotations

import torch

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.nvfp4_quantize import e2m1_codes, pack_e2m1

MX_BLOCK_SIZE = 32
E2M1_EXPONENT = 2
"""The exponent of E2M1's largest value, 6 = 1.5 * 2^2."""

NO_EXPONENT = torch.iinfo(torch.int32).min
"""Stands for the shared exponent of a block of zeros."""

_LOWEST = -9
LARGEST_SCALE_EXPONENT = 8
"""The exponent of E4M3's largest power of two. The smallest is 2^-9, a subnormal number."""

LARGEST_SPAN = LARGEST_SCALE_EXPONENT - _LOWEST
"""The largest difference between a tensor's shared exponents that NVFP4's block scales hold."""

_CHUNK_ELEMENTS = 1 << 20


def mxfp4_exponents(weight: torch.Tensor) -> torch.Tensor:
    """Returns the shared exponents of a weight's blocks.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16, finite, K a multiple of 32.

    Returns:
        ``[N, K / 32]`` int32; :data:`NO_EXPONENT` for a block of zeros.

    Raises:
        ValueError: a shape or dtype other than the above.
    """
    if weight.ndim != 2 or weight.shape[1] % MX_BLOCK_SIZE:
        raise ValueError(f"weight must be [N, K] with K a multiple of {MX_BLOCK_SIZE}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    amax = weight.unflatten(1, (-1, MX_BLOCK_SIZE)).abs().amax(-1).float()
    exponent = torch.frexp(amax).exponent - 1 - E2M1_EXPONENT  # frexp's mantissa is in [0.5, 1)
    return exponent.masked_fill_(amax == 0, NO_EXPONENT)


def mxfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Returns the per-tensor divisor that puts the largest shared exponent at the top of E4M3.

    Args:
        amax: one finite value >= 0, the largest magnitude of the weight or of all weights that
            share the divisor.

    Returns:
        ``[1]`` float32, a power of two up to 2^126; 1 where ``amax`` is 0.

    Raises:
        ValueError: ``amax`` is not one value, is negative, or is not finite.
    """
    if amax.numel() != 1 or not torch.isfinite(amax).item() or amax.item() < 0:
        raise ValueError(f"amax must be one finite value >= 0, got {amax.tolist()}")
    if amax.item() == 0:
        return torch.ones(1)
    exponent = torch.frexp(amax.float()).exponent.item() - 1 - E2M1_EXPONENT
    return torch.tensor([2.0 ** min(LARGEST_SCALE_EXPONENT - exponent, 126)], dtype=torch.float32)


def quantize_mxfp4(weight: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds ``weight`` to MXFP4 under a given divisor of the container.

    Args:
        weight: as for :func:`mxfp4_exponents`.
        global_scale: one float32, see :func:`mxfp4_global_scale`.

    Returns:
        ``packed`` ``[N, K / 2]`` uint8, the even input channel in the low nibble, and ``scale``
        ``[N, K / 16]`` float8_e4m3fn, whose entries are powers of two and equal in pairs. A block
        of zeros has the largest scale, 2^8.

    Raises:
        ValueError: as :func:`mxfp4_exponents`; ``global_scale`` is not a power of two; or a block's
            scale is outside E4M3.
    """
    mantissa, shift = torch.frexp(global_scale.float().reshape(-1).cpu())
    if mantissa.tolist() != [0.5]:
        raise ValueError(f"global_scale must be one power of two, got {global_scale.tolist()}")
    exponents = mxfp4_exponents(weight)
    # The shared exponent that gets the largest scale.
    top = LARGEST_SCALE_EXPONENT - (shift.item() - 1)
    exponents = torch.where(exponents == NO_EXPONENT, top, exponents)
    if exponents.numel() and not (top - LARGEST_SPAN <= exponents.min() and exponents.max() <= top):
        raise ValueError(
            f"shared exponents from {exponents.min()} to {exponents.max()}, but with this "
            f"global_scale E4M3 holds those from {top - LARGEST_SPAN} to {top}"
        )
    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    rows = max(1, _CHUNK_ELEMENTS // max(k, 1))
    for start in range(0, n, rows):
        blocks = weight[start : start + rows].unflatten(1, (-1, MX_BLOCK_SIZE)).float()
        codes = e2m1_codes(torch.ldexp(blocks, -exponents[start : start + rows].unsqueeze(-1)))
        packed[start : start + rows] = pack_e2m1(codes.flatten(1))
    return packed, container_scales(exponents, top)


def container_scales(exponents: torch.Tensor, top: int) -> torch.Tensor:
    """Returns the block scales of NVFP4 that stand for shared exponents:
    ``2^(exponent - top + 8)``, each for two blocks of 16.

    Args:
        exponents: ``[N, K / 32]`` int32, from ``top - LARGEST_SPAN`` to ``top``.
        top: the exponent that becomes E4M3's largest power of two. The divisor of the tensor is
            ``2^(8 - top)``.

    Returns:
        ``[N, K / 16]`` float8_e4m3fn.
    """
    scale = torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents - top + LARGEST_SCALE_EXPONENT)
    codes = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.repeat_interleave(MX_BLOCK_SIZE // BLOCK_SIZE, dim=1).view(torch.float8_e4m3fn)
