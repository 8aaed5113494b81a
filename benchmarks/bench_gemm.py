"""Times the Hopper NVFP4 GEMM against cuBLAS bf16 on the projections of Qwen2.5-7B and 32B.

    python benchmarks/bench_gemm.py --json benchmarks/results/gemm_h200.json   # the shipped choice of kernels
    python benchmarks/bench_gemm.py --tune --shapes others --json others.json  # shapes that the table does not know
    python benchmarks/bench_gemm.py --sweep --json sweep.json                  # every configuration (to tune tuning.py)

    python benchmarks/bench_gemm.py --lora --json benchmarks/results/lora_gemm_h200.json    # with an adapter of rank 32

    python benchmarks/bench_gemm.py --lora --sweep --between --json sweep.json    # to tune MEASURED_WITH_ADAPTER

With --between, another small kernel runs before each GEMM, as in a model, and its time is
subtracted. With --lora, the NVFP4 GEMM includes the LoRA delta of one adapter (an A and a B for
each fused projection), and the baseline is cuBLAS bf16 for the base, for x A^T and, added in place,
for the GEMMs with B. With vLLM installed, its Marlin kernel (without adapter) is timed as well.

Times come from CUDA graphs of many calls that rotate through copies of the weight, so that no copy
stays in the L2 cache; the median over replays counts. A ratio is cuBLAS time / NVFP4 time: above 1
the NVFP4 kernel is faster.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from result_file import ResultFile

from qerl_verl.kernels import hopper
from qerl_verl.kernels.hopper import launch, tuning
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight

SHAPES = {
    "7B qkv": (4608, 3584), "7B o": (3584, 3584), "7B gate_up": (37888, 3584), "7B down": (3584, 18944),
    "32B qkv": (7168, 5120), "32B o": (5120, 5120), "32B gate_up": (55296, 5120), "32B down": (5120, 27648),
    # shapes that the table of tuning.py does not have
    "1.5B qkv": (2048, 1536), "1.5B gate_up": (17920, 1536), "1.5B down": (1536, 8960),
    "3B qkv": (2560, 2048), "3B gate_up": (22016, 2048), "3B down": (2048, 11008),
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
    "14B gate_up": (27648, 5120), "14B down": (5120, 13824),
    "72B qkv": (10240, 8192), "72B o": (8192, 8192), "72B down": (8192, 29568),
}  # fmt: skip
TABLE = ("7B qkv", "7B o", "7B gate_up", "7B down", "32B qkv", "32B o", "32B gate_up", "32B down")
OTHERS = tuple(name for name in SHAPES if name not in TABLE)
ENDS = {
    "7B qkv": (3584, 4096, 4608),
    "7B gate_up": (18944, 37888),
    "32B qkv": (5120, 6144, 7168),
    "32B gate_up": (27648, 55296),
    "1.5B qkv": (1536, 1792, 2048), "1.5B gate_up": (8960, 17920), "3B qkv": (2048, 2304, 2560), "3B gate_up": (11008, 22016),
    "8B qkv": (4096, 5120, 6144), "8B gate_up": (14336, 28672), "14B gate_up": (13824, 27648),
    "72B qkv": (8192, 9216, 10240),
}  # fmt: skip
RANK = 32
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ROTATE_BYTES = 256 << 20
GLOBAL_SCALE = 640.0


def time_calls(call, copies: int, target_us: float, replays: int = 7) -> float:
    """Returns the median time in microseconds of ``call(i)``, with ``i`` rotating through
    ``copies``."""
    calls = max(copies, min(200, math.ceil(1500 / target_us)))
    calls = math.ceil(calls / copies) * copies
    for i in range(copies if copies < 4 else 4):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times)


def make_weight(n: int, k: int):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n, k // 16, device="cuda") * 300 + 20).to(torch.float8_e4m3fn).view(torch.uint8)
    return packed, scale, PackedWeight(*hopper.prepack(packed, scale), GLOBAL_SCALE)


def reference_error(y, x, packed, scale, bias=None, rows: int = 4096, adapter=None) -> float:
    """Returns the relative error against float64 on up to ``rows`` output channels of both ends."""
    n = packed.shape[0]
    index = (
        torch.arange(n, device="cuda")
        if n <= rows
        else torch.cat((torch.arange(rows // 2, device="cuda"), torch.arange(n - rows // 2, n, device="cuda")))
    )
    weight = block_values_nvfp4(packed[index], scale[index], torch.float64)
    expected = x.double() @ weight.t() / GLOBAL_SCALE
    if bias is not None:
        expected += bias[index].double()
    if adapter is not None:
        expected += adapter.delta(x, index)
    got = y[:, index].double()
    return ((got - expected).norm() / expected.norm()).item()


class Adapter:
    """An adapter of rank 32 on a weight, for the kernel and for cuBLAS."""

    def __init__(self, name: str, n: int, k: int):
        self.ends = ENDS.get(name, (n,))
        self.a = torch.randn(len(self.ends) * RANK, k, device="cuda", dtype=torch.bfloat16) / k**0.5
        self.b = torch.randn(n, RANK, device="cuda", dtype=torch.bfloat16) * 0.1
        self.lora = (self.a, hopper.prepack_lora_b(self.b), self.ends, 1.0)

    def cublas(self, x, weight):
        y = torch.mm(x, weight.t())
        u = torch.mm(x, self.a.t())
        begin = 0
        for i, end in enumerate(self.ends):
            y[:, begin:end].addmm_(u[:, i * RANK : (i + 1) * RANK], self.b[begin:end].t())
            begin = end
        return y

    def delta(self, x, index):
        u = (x.double() @ self.a.double().t()).bfloat16().double()
        full = torch.cat([
            u[:, i * RANK : (i + 1) * RANK] @ self.b[begin:end].double().t()
            for i, (begin, end) in enumerate(zip((0, *self.ends), self.ends))
        ], dim=1)  # fmt: skip
        return full[:, index]


def marlin_call(packed, scale, n: int, k: int):
    """Returns ``call(x)`` of vLLM's Marlin on the same weight, or None without vLLM."""
    try:
        from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import (
            apply_fp4_marlin_linear,
            prepare_fp4_layer_for_marlin,
        )
    except ImportError:
        return None
    layer = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition, layer.params_dtype = n, k, torch.bfloat16
    layer.weight = torch.nn.Parameter(packed.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale.clone().view(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_global_scale = torch.nn.Parameter(torch.tensor(1.0 / GLOBAL_SCALE, device="cuda"), requires_grad=False)
    prepare_fp4_layer_for_marlin(layer)
    return lambda x: apply_fp4_marlin_linear(
        x, layer.weight, layer.weight_scale, layer.weight_global_scale, layer.workspace, n, k
    )


SHRINKS = [tuning.Shrink(shape, cluster) for shape in (0, 1) for cluster in (8, 4, 2)]


def environment() -> dict:
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return {
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": nvcc[-2] if len(nvcc) > 1 else None,
        "driver": subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip(),
    }


def copy_bandwidth() -> float:
    """Returns the bandwidth of a device-to-device copy in TB/s, bytes read plus bytes written."""
    a, b = (torch.empty(4 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for _ in range(8):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return 2 * a.numel() / statistics.median(times) * 1e-12


def geomean(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def measure_shape(name: str, args: argparse.Namespace, result: dict) -> None:
    """Adds the times of one weight shape to ``result`` and prints them."""
    n, k = SHAPES[name]
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    packed, scale, weight = make_weight(n, k)
    copies = max(2, math.ceil(ROTATE_BYTES / (n * k * 9 / 16)))
    more = range(copies - 1)
    weights = [weight, *(PackedWeight(weight.packed.clone(), weight.scale.clone(), GLOBAL_SCALE) for _ in more)]
    dense_copies = max(2, math.ceil(ROTATE_BYTES / (n * k * 2)))
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(dense_copies)]

    us = time_calls(lambda i: hopper.block_values(*weights[i][:2]), copies, n * k * 2.56 / 4e6)
    rate = n * k * (2 + 9 / 16) / us * 1e-6
    of_copy = rate / result["copy_TB_per_s"]
    result["dequantize"].append({"shape": name, "n": n, "k": k, "us": us, "TB_per_s": rate, "of_copy": of_copy})
    print(f"{name:12} block values {us:7.1f} us {rate:.2f} TB/s ({of_copy:.0%} of copy)", flush=True)

    def measure_plan(x, plan, floor, how):
        def gemm(i):
            if args.between:
                x.mul_(1.0)
            return launch.run_plan(x, weights[i], None, plan, args.pdl, lora=lora, how=how)

        lora = adapter.lora if adapter else None
        y = launch.run_plan(x, weight, None, plan, args.pdl, lora=lora)
        error = reference_error(y, x, packed, scale, rows=512 if args.sweep else 4096, adapter=adapter)
        us = time_calls(
            gemm,
            copies,
            floor,
            3 if args.sweep else 7,
        )
        return us, error

    adapter = Adapter(name, n, k) if args.lora else None
    align = tuning.alignment(adapter.ends) if adapter else 0
    if args.tune:
        start = time.monotonic()
        hopper.tune(torch.device("cuda", torch.cuda.current_device()), n, k, adapter.ends if adapter else None, RANK)
        result["tuning_seconds"][name] = time.monotonic() - start
        print(f"{name:12} launches measured in {result['tuning_seconds'][name]:.1f} s", flush=True)
    marlins = [marlin_call(packed, scale, n, k) for _ in range(copies if args.marlin else 0)]

    def measure_cublas(x, floor):
        if adapter:
            return time_calls(lambda i: adapter.cublas(x, dense[i]), dense_copies, floor)
        return time_calls(lambda i: torch.mm(x, dense[i].t()), dense_copies, floor)

    line = []
    for m in args.tokens:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        between = time_calls(lambda i, x=x: x.mul_(1.0), copies, 2.0) if args.between else 0.0
        floor = max(n * k * 2 / 4.0e6, 2 * m * n * k / 7e8)
        cublas = measure_cublas(x, floor)
        plans = [tuning.choose(m, n, k, sms, align)]
        marlin = None
        if marlins:
            marlin = time_calls(lambda i, x=x: marlins[i](x), copies, floor / 2)
        if args.sweep:
            plans = [*tuning.candidates(m, n, k, sms, align), *([tuning.DECODE_FIRST] if m > 128 else [])]
        how = tuning.choose_shrink(m, n, k, adapter.a.shape[0], sms, align) if adapter else None
        tries = [(plan, None if args.sweep else how) for plan in plans]
        if args.sweep and args.lora:
            quick = sorted(plans, key=lambda plan: measure_plan(x, plan, floor / 2, None)[0])[:3]
            tries += [(plan, how) for plan in quick for how in SHRINKS]
        rows = []
        for plan, how in tries:
            us, error = measure_plan(x, plan, floor / 2, how)
            us -= between
            row = {
                "shape": name,
                "n": n,
                "k": k,
                "m": m,
                "plan": plan[:3],
                "shrink": how,
                "us": us,
                "cublas_us": cublas,
                "marlin_us": marlin,
                "error": error,
            }
            if error < args.max_error:
                rows.append(row)
            else:
                print("ERROR", row, flush=True)
        if args.sweep:
            result["sweep"] += rows
        if rows:
            best = min(rows, key=lambda row: row["us"])
            best["ratio"] = cublas / best["us"]
            result["gemm"].append(best)
            than_marlin = f" marlin {marlin / best['us']:.2f}x" if marlin else ""
            line.append(f"{m}:{best['us']:.1f}/{best['ratio']:.2f}x{than_marlin} {best['plan']}")
    print("  " + "  ".join(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time every configuration, not only the chosen one")
    parser.add_argument(
        "--tune", action="store_true", help="measure the launches of each shape first, as a model does when it is built"
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--shapes", nargs="*", default=list(TABLE), help="names, or `others`: those without a table")
    parser.add_argument(
        "--pdl", type=int, default=1, help="0: without programmatic dependent launch, which is the default"
    )
    parser.add_argument("--between", action="store_true", help="another kernel before each GEMM, its time taken off")
    parser.add_argument("--lora", action="store_true", help="with an adapter of rank 32")
    parser.add_argument("--marlin", action="store_true", help="time vLLM's Marlin too; needs vLLM")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--max-error", type=float, default=2.6e-3)
    args = parser.parse_args()
    if args.shapes == ["others"]:
        args.shapes = list(OTHERS)

    torch.manual_seed(0)
    if reason := hopper.unsupported_device():
        raise SystemExit(reason)
    result = {
        "environment": environment(),
        "copy_TB_per_s": copy_bandwidth(),
        "gemm": [],
        "dequantize": [],
        "sweep": [],
        "tuning_seconds": {},
    }
    print(f"copy {result['copy_TB_per_s']:.2f} TB/s", flush=True)
    with ResultFile(args.json, result) as file:
        for name in file.steps(args.shapes):
            measure_shape(name, args, file.content)
            torch.cuda.empty_cache()
            summarize(file.content, args.tokens)
    summary = file.content["geomean_by_tokens"]
    print("geomean of cuBLAS / NVFP4: " + "  ".join(f"M={m} {s['ratio']:.2f}" for m, s in summary.items()))
    print(f"largest error {max(s['max_error'] for s in summary.values()):.2e}")


def summarize(result: dict, tokens: list[int]) -> None:
    """Adds the mean ratio and the largest error over the measured shapes, by tokens."""
    summary = {}
    for m in tokens:
        rows = [r for r in result["gemm"] if r["m"] == m]
        if rows:
            summary[m] = {"ratio": geomean(r["ratio"] for r in rows), "max_error": max(r["error"] for r in rows)}
    result["geomean_by_tokens"] = summary


if __name__ == "__main__":
    main()
