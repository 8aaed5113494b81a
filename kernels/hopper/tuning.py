"""Which kernel serves which product: the configurations of ``nvfp4_gemm.cu`` and the choice among them by shape."""

from __future__ import annotations

import functools
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
    Config(8, 4, 1, 2, 10, 1, False),
    Config(8, 4, 1, 4, 5, 1, False),
    Config(8, 2, 1, 2, 9, 2, False),
    Config(8, 2, 2, 2, 5, 2, False),
    Config(8, 4, 1, 4, 5, 1, True),
    Config(8, 2, 2, 2, 5, 2, True),
    Config(16, 4, 1, 4, 5, 1, False),
    Config(16, 2, 1, 2, 8, 2, False),
    Config(16, 2, 2, 2, 5, 2, False),
    Config(16, 4, 1, 4, 5, 1, True),
    Config(32, 4, 1, 2, 8, 1, False),
    Config(32, 2, 1, 2, 6, 2, False),
    Config(32, 4, 1, 2, 8, 1, True),
    Config(32, 2, 1, 2, 6, 2, True),
    Config(32, 2, 2, 2, 4, 2, True),
    Config(64, 4, 1, 2, 6, 1, False),
    Config(64, 2, 1, 2, 4, 2, False),
    Config(64, 4, 1, 2, 6, 1, True),
    Config(64, 2, 1, 2, 4, 2, True),
    Config(64, 2, 2, 2, 6, 1, True),
    Config(128, 2, 2, 2, 4, 1, False),
    Config(128, 2, 1, 2, 5, 1, False),
    Config(128, 4, 1, 1, 8, 1, True),
    Config(128, 2, 2, 2, 4, 1, True),
    Config(128, 2, 2, 1, 8, 1, True),
    Config(128, 2, 1, 2, 5, 1, True),
    Config(256, 2, 1, 1, 6, 1, False),
    Config(256, 2, 1, 1, 6, 1, True),
)


class Plan(NamedTuple):
    """``config`` -1: dequantize and cuBLAS."""

    config: int
    blocks: int
    cluster: int  # blocks that share each tile through their shared memory, 0: shares of equal length, see nvfp4_gemm.cu
    workspace: int  # bytes


DEQUANTIZE = Plan(-1, 0, 0, 0)


def tiles(config: int, m: int, n: int) -> int:
    c = CONFIGS[config]
    return -(-n // (64 * c.row_units)) * -(-m // c.tokens)


def steps(config: int, k: int) -> int:
    return k // (64 * CONFIGS[config].k_units)


def plan(config: int, blocks: int, m: int, n: int, k: int, cluster: int = 0) -> Plan:
    """The plan of a configuration with a number of thread blocks, or of blocks in a cluster for each tile."""
    count = tiles(config, m, n)
    if cluster:
        return Plan(config, count * cluster, cluster, 0)
    blocks = min(blocks, count * steps(config, k))
    c = CONFIGS[config]
    cut = count % blocks != 0
    return Plan(config, blocks, 0, 2 * blocks * 64 * c.row_units * c.tokens * 4 if cut else 0)


@functools.lru_cache(maxsize=4096)
def choose(m: int, n: int, k: int, sms: int) -> Plan:
    if m > 512:
        return DEQUANTIZE
    order = [i for i in (1, 4, 6, 10, 15, 24, 26) if k % (64 * CONFIGS[i].k_units) == 0]
    config = next(i for i in order if CONFIGS[i].tokens >= m or i == order[-1])
    return plan(config, sms * CONFIGS[config].blocks_per_sm, m, n, k)
