"""Which path serves which product, by its shape. No Triton in here, so that it can be asked anywhere."""

from __future__ import annotations

import functools
from typing import NamedTuple

DEQUANTIZE_ABOVE = 512
"""More tokens than this: unpack the weight once and leave the product to the GPU's library."""

MULTIPROCESSORS = 108
"""Assumed where no device is asked (an A100's)."""

MAX_SPLIT = 16
MIN_STEPS = 4
"""Steps along K that a part of a split product has at least."""


class Plan(NamedTuple):
    """How a product is computed.

    ``path`` "fused": one kernel decodes the weight on its way into the product. A program makes ``block_n`` output
    channels of ``block_m`` tokens, ``block_k`` input channels a step; K is divided among ``split_k`` programs, whose
    float32 partial sums a second kernel adds in a fixed order. ``path`` "dequantize": a temporary 16-bit weight and
    torch.addmm; the other fields are 0.
    """

    path: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    split_k: int = 0
    warps: int = 0
    stages: int = 0

    def __str__(self) -> str:
        if self.path == "dequantize":
            return "dequantize, then torch.addmm"
        return (
            f"fused, tile {self.block_m} x {self.block_n} x {self.block_k} (tokens, outputs, inputs), "
            f"K in {self.split_k}, {self.warps} warps, {self.stages} stages"
        )


DEQUANTIZE = Plan("dequantize")

# Small enough for 255 registers a thread and 99 KiB of shared memory (compute capability 8.6, 8.9 and 12.0).
# (tokens up to, block_m, block_n, block_k, warps, stages)
TILES = (
    (16, 16, 64, 128, 4, 3),
    (32, 32, 64, 128, 4, 3),
    (64, 64, 64, 128, 4, 3),
    (DEQUANTIZE_ABOVE, 64, 128, 128, 8, 3),
)


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, multiprocessors: int = MULTIPROCESSORS) -> Plan:
    """The plan for ``m`` tokens and an ``[n, k]`` weight, ``k`` a multiple of 64.

    K is split where there are fewer tiles than two for each multiprocessor. The plan, and with it the order of every sum,
    depends on nothing but the arguments.
    """
    if m > DEQUANTIZE_ABOVE:
        return DEQUANTIZE
    block_m, block_n, block_k, warps, stages = next(tile[1:] for tile in TILES if m <= tile[0])
    if k % block_k:
        block_k = 64
    tiles = -(-m // block_m) * -(-n // block_n)
    steps = k // block_k
    split = max(1, min(2 * multiprocessors // max(1, tiles), steps // MIN_STEPS, MAX_SPLIT))
    split = -(-steps // -(-steps // split))  # no part is empty
    return Plan("fused", block_m, block_n, block_k, split, warps, stages)
