"""Chooses how a GEMM is launched by its shape. This module works without Triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from qerl_verl.kernels import autotune
from qerl_verl.kernels.triton.support import interpreted

DECODE_FIRST_ABOVE = 512
"""For more tokens than this the weight is decoded to 16 bits, and the GPU's library multiplies."""

MULTIPROCESSORS = 108
"""The number assumed without a device, that of an A100."""

MAX_SPLIT = 16
MIN_STEPS = 4
"""The least number of steps along K in a part of a split GEMM."""


class Plan(NamedTuple):
    """How a GEMM is computed.

    With ``path`` "fused" one kernel decodes the weight on its way to the tensor cores. A program
    makes ``block_n`` output channels of ``block_m`` tokens, ``block_k`` input channels a step. K is
    divided among ``split_k`` programs, whose float32 partial sums a second kernel adds in a fixed
    order. ``path`` "decode first" is a temporary 16-bit weight and torch.addmm; the other fields
    are 0 then."""

    path: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    split_k: int = 0
    warps: int = 0
    stages: int = 0

    def __str__(self) -> str:
        if self.path == "decode first":
            return "decode, then torch.addmm"
        return (
            f"fused, tile {self.block_m} x {self.block_n} x {self.block_k} (tokens, outputs, "
            f"inputs), K in {self.split_k}, {self.warps} warps, {self.stages} stages"
        )


DECODE_FIRST = Plan("decode first")

# Small enough for 255 registers a thread and 99 KiB of shared memory (compute capability 8.6, 8.9
# and 12.0). (tokens up to, block_m, block_n, block_k, warps, stages)
TILES = (
    (16, 16, 64, 128, 4, 3),
    (32, 32, 64, 128, 4, 3),
    (64, 64, 64, 128, 4, 3),
    (DECODE_FIRST_ABOVE, 64, 128, 128, 8, 3),
)
"""What is launched where nothing was measured."""

LIMITS = (16, 32, 64, 128, 256, 512, 1024)
"""Numbers of tokens that are measured; each choice serves the numbers between the limit before and
this one. More tokens than the last are decoded first without a choice."""

DECODE_FIRST_CANDIDATE_FROM = 32
"""For fewer tokens a temporary 16-bit weight is not a candidate: it costs more traffic than a
GEMM."""

# (block_m, block_n, block_k, warps, stages), beside those of TILES
MORE_TILES = (
    (16, 32, 128, 4, 4),
    (16, 64, 128, 4, 5),
    (16, 128, 128, 4, 3),
    (32, 128, 128, 4, 3),
    (32, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 3),
    (128, 128, 64, 8, 3),
)
"""Further tiles that are measured."""


class Tuned(NamedTuple):
    """A plan measured on the machine at hand, for up to ``limit`` tokens, see
    ``triton/measure.py``."""

    limit: int
    plan: Plan


_tuned: dict[tuple[int, int], tuple[Tuned, ...]] = {}


def install(n: int, k: int, choices: Sequence[Tuned]) -> None:
    """Uses measured choices for an ``[n, k]`` weight from now on.

    Args:
        choices: by ascending ``limit``; more tokens than the last limit are decoded first.
    """
    _tuned[n, k] = tuple(choices)
    choose.cache_clear()


def tune(device: torch.device, n: int, k: int) -> str | None:
    """Measures the launch configurations of an ``[n, k]`` weight, unless the cache has them, and
    use the fastest.

    A temporary 16-bit weight and torch.addmm are among the candidates, so they are the choice where
    no kernel of ours is faster.

    Args:
        device: a CUDA device.
        n: rows of the weight.
        k: columns, a multiple of 64.

    Returns:
        A sentence that says what was measured, or why the built-in table stays in use; None if
        neither.
    """
    if not autotune.enabled() or interpreted():
        return None
    from qerl_verl.kernels.triton import measure

    with torch.cuda.device(device):
        return measure.tune(n, k)


def installed(n: int, k: int) -> bool:
    """Returns whether measured choices are in use for an ``[n, k]`` weight."""
    return (n, k) in _tuned


def _plan(m: int, n: int, k: int, tile: tuple[int, ...], split: int) -> Plan:
    """Returns the plan of a tile with K in at most ``split`` parts, none of them empty."""
    block_m, block_n, block_k, warps, stages = tile
    steps = k // block_k
    split = max(1, min(split, steps // MIN_STEPS, MAX_SPLIT))
    split = -(-steps // -(-steps // split))
    return Plan("fused", block_m, block_n, block_k, split, warps, stages)


def _parts_for_two_waves(m: int, n: int, tile: tuple[int, ...], multiprocessors: int) -> int:
    return 2 * multiprocessors // max(1, -(-m // tile[0]) * -(-n // tile[1]))


def _fitting(tile: tuple[int, ...], k: int) -> tuple[int, ...]:
    return tile if k % tile[2] == 0 else (*tile[:2], 64, *tile[3:])


def candidates(m: int, n: int, k: int, multiprocessors: int = MULTIPROCESSORS) -> Iterator[Plan]:
    """Plans worth measuring for ``m`` tokens and an ``[n, k]`` weight, that of the table first.

    Args:
        k: a multiple of 64.
        multiprocessors: of the GPU.
    """
    plans = {_choose(m, n, k, multiprocessors): None}
    largest = min(128, max(16, 1 << (m - 1).bit_length()))
    for tile in dict.fromkeys((*(tile[1:] for tile in TILES), *MORE_TILES)):
        if not largest // 2 <= tile[0] <= largest or (m > 32 and tile[0] < 64):
            continue
        fitting = _fitting(tile, k)
        parts = max(1, _parts_for_two_waves(m, n, fitting, multiprocessors))
        for split in (parts, 2 * parts, -(-parts // 2)):
            plans[_plan(m, n, k, fitting, split)] = None
    if m >= DECODE_FIRST_CANDIDATE_FROM:
        plans[DECODE_FIRST] = None
    yield from plans


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, multiprocessors: int = MULTIPROCESSORS) -> Plan:
    """Returns the plan for ``m`` tokens and an ``[n, k]`` weight, ``k`` a multiple of 64.

    It is the one measured on this machine if :func:`install` was called for the weight, else that
    of TILES, with K split if there are fewer tiles than two for each multiprocessor. The plan, and
    with it the order of every sum, depends on the arguments and the installed choices alone.
    """
    if choices := _tuned.get((n, k)):
        return next((choice.plan for choice in choices if m <= choice.limit), DECODE_FIRST)
    return _choose(m, n, k, multiprocessors)


def _choose(m: int, n: int, k: int, multiprocessors: int) -> Plan:
    if m > DECODE_FIRST_ABOVE:
        return DECODE_FIRST
    tile = _fitting(next(tile[1:] for tile in TILES if m <= tile[0]), k)
    return _plan(m, n, k, tile, _parts_for_two_waves(m, n, tile, multiprocessors))


def decoded_inside_up_to(n: int, k: int) -> int | None:
    """Returns the most tokens for which the GEMM of an ``[n, k]`` weight decodes it itself; None if
    that was not measured.

    With more tokens the weight is decoded to 16 bits first and PyTorch multiplies; 0 means that
    this is always so.
    """
    if not installed(n, k):
        return None
    return max((choice.limit for choice in _tuned[n, k] if choice.plan != DECODE_FIRST), default=0)
