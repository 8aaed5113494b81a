"""Defines an NVFP4 weight with its scales, as the GEMMs take it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PackedWeight(NamedTuple):
    """The weight ``e2m1 * scale / global_scale``, ``[N, K]``.

    A GEMM multiplies the block values ``e2m1 * scale``, which are exact in 16 bits, and divides its
    float32 accumulator by ``global_scale``. This is a named tuple and not a dataclass because
    torch.compile, which traces the rollout engine's layers, builds it without a graph break.

    Attributes:
        packed: ``[N, K / 2]`` uint8, two E2M1 codes a byte, in the layout of a backend. In the
            checkpoint's layout the even input channel is in the low nibble.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8, in the same layout.
        global_scale: the divisor of the tensor, ``weight_global_scale`` of compressed-tensors, on
            the host.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: float
