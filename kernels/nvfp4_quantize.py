"""Quantizes a weight to NVFP4: ``w ~= e2m1 * block_scale / global_scale``.

The convention, down to ties and zeros, is that of compressed-tensors 0.17
(``nvfp4-pack-quantized``), so that for the same global scale the bytes are the ones it writes:

    global_scale = 448 * 6 / max|w|                    of the tensor, or of all fused tensors
    block_scale  = e4m3(global_scale * (max|w| / 6))   of 16 input channels; 0.125 if this is zero
    code         = e2m1(w / (block_scale / global_scale))

Both roundings are to nearest, ties to even. A value that is negative and rounds to zero keeps its
sign (code 8).

"Four over six" (arXiv 2512.02010) writes the same format and leaves the largest E2M1 step (4 to 6)
unused in the blocks
where that lowers the squared error: see :func:`quantize_nvfp4_four_over_six`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE, E2M1_VALUES

E2M1_MAX = E2M1_VALUES[-1]
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
FOUR_OVER_SIX_SCALE_MAX = 256.0
"""Largest block scale under "four over six" where 6 stands for the block's maximum; where 4
does, it is 384 <= 448."""
ZERO_BLOCK_SCALE = torch.finfo(torch.float8_e4m3fn).eps
"""The scale of a block whose own scale rounds to zero."""

_CHUNK_ELEMENTS = (1 << 18, 1 << 24)
"""Weights at a time, on a CPU (temporaries stay in cache, enough work for eight threads) and on
a GPU."""


def nvfp4_global_scale(amax: torch.Tensor, largest_block_scale: float = E4M3_MAX) -> torch.Tensor:
    """Returns the per-tensor divisor, ``largest_block_scale * 6 / amax``.

    As ``generate_gparam`` in ``compressed_tensors/quantization/utils/helpers.py`` computes it from
    float32 ranges.

    Args:
        amax: one finite value >= 0, the largest magnitude of the weight or of all weights that
            share the scale.
        largest_block_scale: what the scale of the block with the largest magnitude becomes; at most
            448.

    Returns:
        ``[1]`` float32. 1.0 where ``amax`` is zero or so small that the quotient exceeds float32
        (below 7.9e-36).

    Raises:
        ValueError: ``amax`` is not one value, is negative, or is not finite.
    """
    if amax.numel() != 1 or not torch.isfinite(amax).item() or amax.item() < 0:
        raise ValueError(f"amax must be one finite value >= 0, got {amax.tolist()}")
    scale = largest_block_scale * E2M1_MAX / amax.float().reshape(1)
    return torch.where(torch.isfinite(scale), scale, 1.0)


@torch.no_grad()
def quantize_nvfp4(weight: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds ``weight`` to NVFP4 under a given global scale.

    As ``calculate_qparams`` (``quantization/utils/helpers.py``), ``quantize``
    (``quantization/lifecycle/forward.py``) and ``pack_fp4_to_uint8``
    (``compressors/nvfp4/helpers.py``) of compressed-tensors do it on a CPU; the quotient
    ``max|w| / 6`` is rounded to the dtype of the weight there, and so it is here. Temporaries take
    about 5 MiB.

    Args:
        weight: ``[N, K]`` float32, bfloat16 or float16, finite, K a multiple of 16.
        global_scale: one float32, see :func:`nvfp4_global_scale`.

    Returns:
        ``packed`` ``[N, K / 2]`` uint8, the even input channel in the low nibble, and
        ``scale`` ``[N, K / 16]`` float8_e4m3fn.

    Raises:
        ValueError: a shape or dtype other than the above.
    """
    # a Python 6.0 multiplies by 1/6 on CUDA
    six = torch.tensor(E2M1_MAX, dtype=weight.dtype, device=weight.device)

    def quantize(blocks: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block_scale = _to_e4m3((blocks.abs().amax(-1) / six).float() * global_scale)
        return e2m1_codes(blocks.float() / (block_scale / global_scale).unsqueeze(-1)), block_scale

    return _by_chunks(weight, global_scale, quantize)


@torch.no_grad()
def quantize_nvfp4_four_over_six(weight: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes with the better of two scales for each block (arXiv 2512.02010, section 3).

    The block's largest magnitude becomes 6, as in :func:`quantize_nvfp4`, or 4, which gives the
    values below it finer steps: whichever has the smaller squared error; 6 where they are equal.
    The bytes are plain NVFP4.

    Args:
        weight: as for :func:`quantize_nvfp4`.
        global_scale: one float32, ``nvfp4_global_scale(amax, FOUR_OVER_SIX_SCALE_MAX)``.

    Returns:
        ``packed`` and ``scale``, as for :func:`quantize_nvfp4`.

    Raises:
        ValueError: as for :func:`quantize_nvfp4`.
    """

    def candidate(blocks, amax, largest, global_scale):
        block_scale = _to_e4m3(amax / amax.new_tensor(largest) * global_scale)
        step = (block_scale / global_scale).unsqueeze(-1)
        code = e2m1_magnitude_codes(blocks / step)
        error = (e2m1_magnitudes(code) * step).sub_(blocks).square_().sum(-1)
        return code, block_scale, error

    def quantize(blocks: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        negative = blocks < 0
        blocks = blocks.float().abs()
        amax = blocks.amax(-1)
        six, scale_six, error_six = candidate(blocks, amax, 6.0, global_scale)
        four, scale_four, error_four = candidate(blocks, amax, 4.0, global_scale)
        use_four = error_four < error_six
        code = torch.where(use_four.unsqueeze(-1), four, six).to(torch.uint8)
        return code | negative.to(torch.uint8) << 3, torch.where(use_four, scale_four, scale_six)

    return _by_chunks(weight, global_scale, quantize)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Returns two codes a byte, the first in the low nibble: ``[N, K]`` uint8 to ``[N, K / 2]``."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _by_chunks(
    weight: torch.Tensor,
    global_scale: torch.Tensor,
    quantize: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``packed`` and ``scale`` of a weight; ``quantize`` maps blocks ``[B, 16]`` to
    codes ``[B, 16]`` and scales ``[B]``."""
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
    rows = max(1, _CHUNK_ELEMENTS[weight.is_cuda] // k)
    for start in range(0, n, rows):
        codes, block_scale = quantize(weight[start : start + rows].reshape(-1, BLOCK_SIZE), global_scale)
        packed[start : start + rows] = pack_e2m1(codes).view(-1, k // 2)
        scale[start : start + rows] = block_scale.view(-1, k // BLOCK_SIZE)  # exact
    return packed, scale


def _to_e4m3(scale: torch.Tensor) -> torch.Tensor:
    """Rounds float32 block scales >= 0 to E4M3, in float32; overwrites its argument."""
    scale = scale.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale[scale == 0] = ZERO_BLOCK_SCALE
    return scale


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Returns the E2M1 codes nearest to float32 ``x``, ties to even, in uint8."""
    return e2m1_magnitude_codes(x.abs()).to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def e2m1_magnitude_codes(a: torch.Tensor) -> torch.Tensor:
    """Returns the codes nearest to float32 ``a`` >= 0, ties to even, in float32; overwrites its
    argument.

    The codes 0-4 are equidistant in a, with step 1/2; 4-6 have step 1; 6-7 have step 2. Each line
    below is the code as if its step held everywhere, and the smallest is right.
    """
    a = a.clamp_(max=E2M1_MAX)
    code = torch.round(a * 2)
    code = torch.minimum(code, torch.round(a).add_(2), out=code)
    return torch.minimum(code, torch.round(a.mul_(0.5)).add_(4), out=code)


def e2m1_magnitudes(code: torch.Tensor) -> torch.Tensor:
    """Returns the values of the codes 0 to 7, float32 to float32: as for the codes, the largest
    of three lines is right."""
    value = torch.maximum(code * 0.5, code - 2)
    return torch.maximum(value, code * 2 - 8, out=value)
