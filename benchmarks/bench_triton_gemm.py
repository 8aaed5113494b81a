"""Times the Triton NVFP4 GEMM with built-in and with measured launches against cuBLAS in bfloat16.

    python benchmarks/bench_triton_gemm.py --json benchmarks/results/triton_gemm_h100.json

Times are in microseconds: medians over replays of CUDA graphs whose calls rotate through copies of
the weight, see bench_gemm.py.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from bench_gemm import GLOBAL_SCALE, ROTATE_BYTES, SHAPES, environment, geomean, time_calls
from result_file import ResultFile

from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.triton import tuning
from qerl_verl.kernels.triton.nvfp4_gemm import run_plan

DEVICE = torch.device("cuda", 0)
NAMES = ("7B qkv", "8B gate_up", "8B down")
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024)


def random_weight(n: int, k: int) -> PackedWeight:
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(n, k // 16, device=DEVICE) * 300 + 20).to(torch.float8_e4m3fn).view(torch.uint8)
    return PackedWeight(packed, scale, GLOBAL_SCALE)


def copies(nbytes: int) -> int:
    return max(2, math.ceil(ROTATE_BYTES / nbytes))


def floor_us(m: int, n: int, k: int) -> float:
    """Estimates the time of a GEMM, so that graphs are long enough."""
    return max(n * k / 4e6, 2 * m * n * k / 1.5e9)


def measure_plans(m: int, plans: dict, weights, dense) -> dict:
    """Returns plan -> time of the Triton GEMM, and the time of cuBLAS, for ``m`` tokens."""
    n, k = dense[0].shape
    x, about = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16), floor_us(m, n, k)

    def timed(plan) -> float:
        return time_calls(lambda i: run_plan(x, weights[i], None, None, None, plan), len(weights), about, 5)

    cublas = time_calls(lambda i: torch.mm(x, dense[i].t()), len(dense), about, 5)
    return {"cublas": cublas} | {
        way: timed(plan) for way, plan in (plans | {"dequantize": tuning.DECODE_FIRST}).items()
    }


def measure_triton(names, result: ResultFile) -> None:
    """Adds the times of each shape, and the mean ratios over the measured shapes by tokens."""
    out = result.content
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for name in result.steps(names):
        n, k = SHAPES[name]
        start = time.monotonic()
        said = tuning.tune(DEVICE, n, k)
        seconds = time.monotonic() - start
        print(name, said, f"{seconds:.1f} s", flush=True)
        weights = [random_weight(n, k) for _ in range(copies(n * k * 9 // 16))]
        dense = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies(n * k * 2))]
        for m in TOKENS:
            plan = tuning.choose(m, n, k, sms)
            us = measure_plans(m, {"table": tuning._choose(m, n, k, sms), "measured": plan}, weights, dense)
            row = {"shape": name, "n": n, "k": k, "m": m, "us": us, "plan": str(plan), "tuning_s": seconds}
            out["gemm"].append(row)
            print(f"{name:10} {m:5}", {key: round(value, 1) for key, value in us.items()}, plan, flush=True)
        for m in TOKENS:
            rows = [row["us"] for row in out["gemm"] if row["m"] == m]
            ratios = {way: geomean(row["cublas"] / row[way] for row in rows) for way in ("table", "measured")}
            out["cublas_over_triton"][str(m)] = ratios
    for m, ratios in out["cublas_over_triton"].items():
        print(f"{m:>5} cuBLAS / Triton", {key: round(value, 2) for key, value in ratios.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=NAMES, choices=SHAPES, help="projections")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with ResultFile(args.json, environment() | {"gemm": [], "cublas_over_triton": {}}) as result:
        measure_triton(args.shapes, result)


if __name__ == "__main__":
    main()
