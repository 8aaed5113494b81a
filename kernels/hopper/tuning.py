"""Chooses how a GEMM is launched by its shape, among the configurations of ``nvfp4_gemm.cu``."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Config(NamedTuple):
    """One compiled instance of the kernel, in the order of ``entries`` in ``nvfp4_gemm.cu``."""

    tokens: int  # tokens a tile (N of the wgmma)
    warpgroups: int  # consumer warpgroups
    units: int  # 64-row units a warpgroup
    k_units: int  # 64-column units a pipeline stage
    stages: int
    blocks_per_sm: int
    fine: bool  # every wgmma committed by itself

    @property
    def row_units(self) -> int:
        return self.warpgroups * self.units


CONFIGS = (
    Config(8, 2, 1, 2, 9, 2, False),  # 0
    Config(8, 2, 2, 2, 5, 2, False),  # 1
    Config(16, 2, 1, 2, 8, 2, False),  # 2
    Config(16, 2, 2, 2, 5, 2, False),  # 3
    Config(32, 4, 1, 2, 8, 1, False),  # 4
    Config(32, 2, 1, 2, 6, 2, False),  # 5
    Config(64, 4, 1, 2, 6, 1, False),  # 6
    Config(64, 2, 1, 2, 4, 2, True),  # 7
    Config(128, 2, 2, 2, 4, 1, False),  # 8
    Config(128, 2, 1, 2, 5, 1, True),  # 9
    Config(256, 2, 1, 1, 6, 1, False),  # 10
    Config(64, 4, 1, 1, 12, 1, False),  # 11
)


class Plan(NamedTuple):
    """How a GEMM is launched. With ``config`` -1 the weight is decoded to bfloat16 for cuBLAS."""

    config: int
    blocks: int
    cluster: (
        # blocks that share each tile through their shared memory, 0: shares of equal length, see
        # nvfp4_gemm.cu
        int
    )
    workspace: int  # bytes


ANY_ALIGNMENT = 1 << 10  # 64-row units: there is no border between projections
DECODE_FIRST = Plan(-1, 0, 0, 0)


def alignment(ends: Sequence[int] | None) -> int:
    """Returns ``align`` of :func:`choose` for fused projections that end at these rows; 0 for
    None, no adapter."""
    if ends is None:
        return 0
    return math.gcd(*(end // 64 for end in ends)) if len(ends) > 1 else ANY_ALIGNMENT


def tiles(config: int, m: int, n: int) -> int:
    c = CONFIGS[config]
    return -(-n // (64 * c.row_units)) * -(-m // c.tokens)


def steps(config: int, k: int) -> int:
    return k // (64 * CONFIGS[config].k_units)


def plan(config: int, blocks: int, m: int, n: int, k: int, cluster: int = 0) -> Plan:
    """Returns the plan of a configuration with a number of thread blocks, or of blocks in a
    cluster for each tile."""
    count = tiles(config, m, n)
    if cluster:
        return Plan(config, count * cluster, cluster, 0)
    blocks = min(blocks, count * steps(config, k))
    c = CONFIGS[config]
    cut = count % blocks != 0
    return Plan(config, blocks, 0, 2 * blocks * 64 * c.row_units * c.tokens * 4 if cut else 0)


# The fastest measured (configuration, thread blocks, cluster) on an H200 with 132 multiprocessors,
# by weight (N, K) and by the number of tokens up to which it applies (TOKENS).
# benchmarks/bench_gemm.py --sweep measures all candidates.
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MEASURED_MULTIPROCESSORS = 132
# fmt: off
MEASURED = {
    (4608, 3584): (
        (0, 252, 0), (2, 252, 0), (5, 216, 0), (7, 216, 6), (9, 108, 3),
        (10, 108, 3), (9, 132, 0), (10, 132, 0), (10, 132, 0), (8, 132, 0),
    ),
    (3584, 3584): (
        (0, 224, 0), (2, 224, 0), (5, 196, 7), (7, 168, 6), (9, 112, 4),
        (9, 112, 2), (9, 112, 0), (10, 112, 0), (10, 112, 0), (8, 132, 0),
    ),
    (37888, 3584): (
        (1, 264, 0), (3, 264, 0), (4, 132, 0), (6, 132, 0), (8, 132, 0),
        (10, 132, 0), (10, 132, 0), (10, 132, 0), (10, 132, 0), (8, 132, 0),
    ),
    (3584, 18944): (
        (1, 238, 0), (2, 224, 0), (4, 112, 8), (7, 224, 8), (8, 112, 8),
        (10, 112, 4), (10, 112, 2), (8, 112, 0), (10, 112, 0), (10, 132, 0),
    ),
    (7168, 5120): (
        (0, 224, 0), (2, 224, 0), (5, 224, 0), (7, 224, 4), (9, 112, 2),
        (10, 112, 2), (10, 112, 0), (10, 132, 0), (10, 132, 0), (8, 132, 0),
    ),
    (5120, 5120): (
        (0, 240, 0), (2, 240, 0), (5, 240, 0), (7, 200, 5), (9, 120, 0),
        (9, 132, 0), (9, 132, 0), (10, 132, 0), (8, 132, 0), (8, 132, 0),
    ),
    (55296, 5120): (
        (1, 264, 0), (3, 264, 0), (4, 132, 0), (6, 132, 0), (8, 132, 0),
        (10, 132, 0), (10, 132, 0), (10, 132, 0), (10, 132, 0), (10, 132, 0),
    ),
    (5120, 27648): (
        (1, 260, 0), (3, 260, 0), (4, 120, 0), (6, 120, 0), (9, 120, 0),
        (10, 120, 0), (10, 132, 0), (10, 132, 0), (8, 132, 0), (8, 132, 0),
    ),
}
# The same with an adapter of rank 32, for the first of TOKENS, and how x A^T is computed (shape and
# cluster of Shrink). Measured with another kernel before each GEMM, as in a model.
MEASURED_WITH_ADAPTER = {
    (4608, 3584): (
        (0, 216, 0, 0, 4), (2, 216, 0, 0, 8), (5, 180, 5, 1, 4),
        (6, 90, 5, 1, 2), (9, 108, 3, 0, 4), (10, 108, 3, 1, 4),
    ),
    (3584, 3584): (
        (0, 196, 7, 0, 4), (2, 196, 7, 0, 4), (5, 196, 7, 1, 8),
        (7, 196, 7, 1, 4), (9, 84, 3, 1, 2), (10, 112, 4, 0, 4),
    ),
    (37888, 3584): (
        (1, 248, 0, 0, 4), (3, 248, 0, 0, 4), (4, 132, 0, 0, 8),
        (6, 132, 0, 0, 8), (8, 132, 0, 0, 4), (10, 132, 0, 1, 8),
    ),
    (3584, 18944): (
        (1, 232, 0, 0, 8), (2, 224, 0, 0, 8), (4, 112, 8, 1, 4),
        (6, 112, 0, 1, 8), (9, 112, 0, 1, 4), (10, 112, 4, 0, 8),
    ),
    (7168, 5120): (
        (1, 168, 6, 1, 8), (2, 224, 0, 1, 2), (4, 112, 4, 1, 2),
        (6, 112, 4, 1, 2), (8, 112, 4, 0, 4), (10, 112, 0, 1, 4),
    ),
    (5120, 5120): (
        (0, 200, 5, 0, 4), (2, 200, 5, 0, 4), (5, 160, 4, 1, 2),
        (7, 200, 5, 1, 4), (8, 100, 5, 1, 2), (10, 120, 0, 0, 4),
    ),
    (55296, 5120): (
        (1, 264, 0, 0, 8), (3, 264, 0, 0, 8), (4, 132, 0, 0, 8),
        (6, 132, 0, 0, 8), (8, 132, 0, 0, 4), (8, 132, 0, 1, 8),
    ),
    (5120, 27648): (
        (1, 232, 0, 0, 8), (3, 240, 0, 1, 8), (4, 120, 0, 1, 4),
        (6, 120, 0, 1, 4), (8, 100, 5, 1, 2), (10, 120, 0, 1, 8),
    ),
}
# fmt: on
DECODE_FIRST_ABOVE = 6144
"""For more tokens than this, without an adapter, the weight is decoded to bfloat16 for cuBLAS."""


def adapt(config: int, blocks: int, cluster: int, measured_tiles: int, m: int, n: int, k: int, sms: int) -> Plan:
    """Returns a measured choice carried over to another shape: the same configuration and way of
    dividing the work."""
    if k % (64 * CONFIGS[config].k_units):
        config, cluster = (11 if m <= 256 else 10), 0
    count, slots = tiles(config, m, n), sms * CONFIGS[config].blocks_per_sm
    parts = min(8, slots // count, steps(config, k))
    if cluster and parts >= 2:
        return plan(config, 0, m, n, k, parts)
    if blocks and blocks % measured_tiles == 0 or cluster:  # every tile in the same number of parts
        return plan(config, count * max(1, slots // count), m, n, k)
    return plan(config, slots, m, n, k)


class Tuned(NamedTuple):
    """A choice measured on the machine at hand, for up to ``limit`` tokens, see
    ``hopper/measure.py``."""

    limit: int
    config: int  # -1: decode to bfloat16 for cuBLAS
    blocks: int
    cluster: int
    shrink: int  # with an adapter, the fields of Shrink
    shrink_cluster: int


_tuned: dict[tuple[int, int, int], tuple[Tuned, ...]] = {}


def install(n: int, k: int, align: int, choices: Sequence[Tuned]) -> None:
    """Uses measured choices for an ``[n, k]`` weight from now on.

    Args:
        align: as for :func:`choose`.
        choices: by ascending ``limit``; the last one also serves more tokens than its limit.
    """
    _tuned[n, k, align] = tuple(choices)
    choose.cache_clear()


def installed(n: int, k: int, align: int) -> bool:
    """Returns whether measured choices are in use for an ``[n, k]`` weight."""
    return (n, k, align) in _tuned


def _tuned_choice(m: int, n: int, k: int, align: int) -> Tuned | None:
    choices = _tuned.get((n, k, align))
    return next((c for c in choices if m <= c.limit), choices[-1]) if choices else None


def _near(tile: int, m: int) -> bool:
    """Returns whether tiles of so many tokens may be the best for ``m``: neither mostly empty
    nor many."""
    if m > 256:
        return tile >= 128
    return m <= tile <= max(8, 2 * m) or (m > 64 and m <= 2 * tile)


def candidates(m: int, n: int, k: int, sms: int, align: int = 0) -> Iterator[Plan]:
    """Returns plans worth measuring for ``m`` tokens and an ``[n, k]`` weight.

    Args:
        align: as for :func:`choose`. With an adapter, some plans leave multiprocessors to x A^T.
    """
    fitting = [i for i, c in enumerate(CONFIGS) if k % (64 * c.k_units) == 0 and not (align and align % c.row_units)]
    near = [i for i in fitting if _near(CONFIGS[i].tokens, m)]
    for config in near or fitting:
        c = CONFIGS[config]
        count, slots = tiles(config, m, n), sms * c.blocks_per_sm
        choice = {slots, *(slots - less for less in (8, 16, 24, 32, 48) if align)}
        if c.blocks_per_sm == 2:
            choice.add(sms)
        if count < slots:
            choice |= {count * s for s in (slots // count, slots // count - 1) if s > 0}
        else:
            choice.add(count)
            if count < 4 * slots:
                choice.add(count // 2)
        most = count * steps(config, k)
        for blocks in sorted({min(blocks, most) for blocks in choice if blocks > 0}):
            yield plan(config, blocks, m, n, k)
        largest = min(8, slots // count, steps(config, k))
        for cluster in range(2, largest + 1):
            if cluster == largest or slots * 0.6 <= count * cluster:
                yield plan(config, 0, m, n, k, cluster)


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, sms: int, align: int = 0) -> Plan:
    """Returns the plan for ``m`` tokens.

    It is the one measured on this machine where :func:`install` was called for the weight, else
    that of MEASURED, else one adapted from the nearest shape in MEASURED.

    Args:
        align: with an adapter, the 64-row units in which every border between fused projections can
            be counted; a tile must not lie across one (``ANY_ALIGNMENT`` without borders). 0: no
            adapter.
    """
    if m > DECODE_FIRST_ABOVE and not align:
        return DECODE_FIRST
    if tuned := _tuned_choice(m, n, k, align):
        if tuned.config < 0:
            return DECODE_FIRST
        measured = tiles(tuned.config, tuned.limit, n)
        if tiles(tuned.config, m, n) == measured:
            return plan(tuned.config, tuned.blocks, m, n, k, tuned.cluster)
        return adapt(tuned.config, tuned.blocks, tuned.cluster, measured, m, n, k, sms)
    chosen = _choose(m, n, k, sms, bool(align))
    if align and align % CONFIGS[chosen.config].row_units:
        config = next(
            i
            for i, c in enumerate(CONFIGS)
            if align % c.row_units == 0
            and k % (64 * c.k_units) == 0
            and (c.tokens >= min(CONFIGS[chosen.config].tokens, m) or c.tokens == 256)
        )
        return adapt(config, 0, chosen.cluster, 1, m, n, k, sms)
    return chosen


def _measured(m: int, n: int, k: int, with_adapter: bool) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """Returns the nearest measured shape, the index into TOKENS, and the entry."""
    shape = min(MEASURED, key=lambda s: abs(math.log(s[0] / n)) + abs(math.log(s[1] / k)))
    column = next((i for i, limit in enumerate(TOKENS) if m <= limit), len(TOKENS) - 1)
    row = MEASURED_WITH_ADAPTER[shape] if with_adapter else ()
    return shape, column, row[column] if column < len(row) else MEASURED[shape][column]


def _choose(m: int, n: int, k: int, sms: int, with_adapter: bool) -> Plan:
    shape, column, entry = _measured(m, n, k, with_adapter)
    config, blocks, cluster = entry[:3]
    measured_tiles = tiles(config, TOKENS[column], shape[0])
    if shape == (n, k) and sms == MEASURED_MULTIPROCESSORS and tiles(config, m, n) == measured_tiles:
        return plan(config, blocks, m, n, k, cluster)
    return adapt(config, blocks, cluster, measured_tiles, m, n, k, sms)


SHRINK_LIMIT = 1024
"""For more tokens than this cuBLAS computes x A^T, not ``lora_shrink.cu``."""


class Shrink(NamedTuple):
    """How ``lora_shrink.cu`` is launched."""

    shape: int  # 0 Deep, 1 Wide
    cluster: int  # blocks that share the inner dimension of a tile


def choose_shrink(m: int, n: int, k: int, rows: int, sms: int, align: int = ANY_ALIGNMENT) -> Shrink:
    """Returns the launch of x A^T with ``m`` tokens, ``k`` columns and ``rows`` rows of A, in front
    of a GEMM with ``n`` rows.

    Args:
        align: as for :func:`choose`.
    """
    tuned = _tuned_choice(m, n, k, align)
    if tuned and tuned.config >= 0:
        return Shrink(tuned.shrink, tuned.shrink_cluster)
    if m <= 256:
        return Shrink(*_measured(m, n, k, True)[2][3:])
    tiles = -(-m // 32) * -(-rows // 32)
    return Shrink(1, next((c for c in (8, 4, 2) if tiles * c <= 2 * sms), 1))
