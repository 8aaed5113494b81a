"""Times the experts of one layer: vLLM's bf16 kernel, and vLLM's Marlin and our Triton on NVFP4.

    python benchmarks/bench_experts.py --json benchmarks/results/experts_h100.json   # one GPU
    python benchmarks/bench_experts.py --tune       # tiles of our kernel
    python benchmarks/bench_experts.py --dry-run    # tiny, on the CPU

The shape is that of Qwen3-30B-A3B: 128 experts of 768 x 2048, 8 for each token, all equally likely.
Times come from CUDA graphs. Each call has other choices, so that few tokens do not find their
experts in the L2 cache. Each kernel's output is compared with the reference in float32.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_gemm import environment, time_calls
from result_file import ResultFile

from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.nvfp4_experts import ExpertStack, nvfp4_experts_reference, route_softmax

SHAPE = {"experts": 128, "top_k": 8, "hidden": 2048, "inner": 768}
DRY_SHAPE = {"experts": 4, "top_k": 2, "hidden": 64, "inner": 64}
TOKENS = (1, 8, 16, 64, 128, 256, 1024, 8192)
COPIES = 16
"""Number of choices of experts that the calls rotate through."""
DTYPE = torch.bfloat16
CANDIDATES = [
    (block_m, block_n, block_k, warps, stages)
    for block_m, block_n, block_k, (warps, stages) in itertools.product(
        (16, 32, 64, 128), (32, 64, 128), (64, 128), ((4, 2), (4, 3), (4, 4), (8, 3))
    )
    if block_m * block_n <= 64 * 128
]


def make_stacks(shape: dict, device: str) -> tuple[ExpertStack, ExpertStack]:
    """Returns random experts: the stack of gate and up, and that of down."""
    count, stacks = shape["experts"], []
    for n, k in ((2 * shape["inner"], shape["hidden"]), (shape["hidden"], shape["inner"])):
        packed = torch.randint(0, 256, (count, n, k // 2), dtype=torch.uint8, device=device)
        scale = (torch.rand(count, n, k // 16, device=device) * 300 + 20).to(torch.float8_e4m3fn)
        factors = (torch.rand(count, device=device) + 0.5) / (400 * k**0.5)
        stacks.append(ExpertStack(packed, scale, factors))
    return tuple(stacks)


def bf16(gate_up: ExpertStack, down: ExpertStack):
    """Returns a call of vLLM's Triton kernel on the decoded weights."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    decoded = [
        torch.stack([s.block_values(e, torch.float32) * s.factors[e] for e in range(len(s.packed))]).to(DTYPE)
        for s in (gate_up, down)
    ]
    return lambda x, weights, chosen: fused_experts(x, *decoded, weights, chosen)


def marlin(gate_up: ExpertStack, down: ExpertStack):
    """Returns a call of vLLM's Marlin, prepared as vLLM's layers do."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import fused_marlin_moe
    from vllm.model_executor.layers.quantization.utils.marlin_utils_fp4 import prepare_nvfp4_moe_layer_for_marlin
    from vllm.scalar_type import scalar_types

    count, hidden, half = down.packed.shape
    layer = SimpleNamespace(
        num_experts=count, hidden_size=hidden, intermediate_size_per_partition=2 * half, params_dtype=DTYPE
    )
    w13, s13, g13, w2, s2, g2 = prepare_nvfp4_moe_layer_for_marlin(
        layer=layer, w13=gate_up.packed, w13_scale=gate_up.scale, w13_scale_2=gate_up.factors,
        w2=down.packed, w2_scale=down.scale, w2_scale_2=down.factors, is_act_and_mul=True,
    )  # fmt: skip
    quant_type = scalar_types.float4_e2m1f.id

    def call(x, weights, chosen):
        return fused_marlin_moe(
            x, w13, w2, None, None, s13, s2, weights, chosen, quant_type_id=quant_type, global_num_experts=count,
            global_scale1=g13, global_scale2=g2,
        )  # fmt: skip

    return call


def triton(gate_up: ExpertStack, down: ExpertStack):
    """Returns a call of our Triton kernel."""
    return lambda x, weights, chosen: triton_kernels.experts(x, weights, chosen, gate_up, down)


def pytorch(gate_up: ExpertStack, down: ExpertStack):
    """Returns a call of the reference, for the dry run."""
    return lambda x, weights, chosen: nvfp4_experts_reference(x, weights, chosen, gate_up, down)


KERNELS = {"bf16": bf16, "marlin": marlin, "triton": triton, "pytorch": pytorch}


def make_inputs(tokens: int, shape: dict, device: str) -> list[tuple[torch.Tensor, ...]]:
    """Returns activations, weights and choices of experts; each set has other choices."""
    x = torch.randn(tokens, shape["hidden"], device=device, dtype=DTYPE)
    out = []
    for _ in range(COPIES):
        weights, chosen = route_softmax(torch.randn(tokens, shape["experts"], device=device), shape["top_k"], True)
        out.append((x, weights, chosen.int()))
    return out


def time_kernel(call, inputs) -> float:
    """Returns the time of a call in microseconds."""
    if inputs[0][0].is_cuda:
        return time_calls(lambda i: call(*inputs[i]), COPIES, 100.0)
    begin = time.perf_counter()
    call(*inputs[0])
    return (time.perf_counter() - begin) * 1e6


def tune(stacks, shape: dict, tokens: list[int], device: str, result: ResultFile) -> None:
    """Adds the fastest tiles of our kernel for each number of tokens."""
    from qerl_verl.kernels.triton.nvfp4_experts import nvfp4_experts

    for name in result.steps(f"{number} tokens" for number in tokens):
        number = int(name.split()[0])
        inputs, times = make_inputs(number, shape, device), []
        for tile in CANDIDATES:
            if tile[0] > max(16, 2 * number) or tile[0] < min(64, number * shape["top_k"] // shape["experts"] // 2):
                continue
            try:
                times.append((time_kernel(lambda *a, tile=tile: nvfp4_experts(*a, *stacks, tile=tile), inputs), tile))
            except Exception as error:  # too little shared memory or registers
                print(f"  {tile}: {type(error).__name__}", flush=True)
        best = sorted(times)[:3]
        result.content["tuning"].append({
            "tokens": number, "best": [{"us": us, "tile": tile} for us, tile in best]
        })  # fmt: skip
        print(f"{number} tokens: " + ", ".join(f"{tile} {us:.0f} us" for us, tile in best), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--kernels", nargs="*", default=["bf16", "marlin", "triton"], choices=KERNELS)
    parser.add_argument("--tune", action="store_true", help="measure tiles of our kernel, and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="a tiny layer in plain PyTorch, on the CPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape, device = SHAPE, "cuda"
    if args.dry_run:
        shape, device, args.kernels, args.tokens = DRY_SHAPE, "cpu", ["pytorch"], [1, 8]
    torch.manual_seed(0)
    stacks = make_stacks(shape, device)
    out = {"environment": None if args.dry_run else environment(), "shape": shape}
    with ResultFile(args.json, out | {"tuning" if args.tune else "times": []}) as result:
        if args.tune:
            tune(stacks, shape, args.tokens, device, result)
        else:
            compare(stacks, shape, args, device, result)


def compare(stacks, shape: dict, args: argparse.Namespace, device: str, result: ResultFile) -> None:
    """Adds time and error of each kernel for each number of tokens."""
    calls = {name: KERNELS[name](*stacks) for name in args.kernels}
    for step in result.steps(f"{number} tokens" for number in args.tokens):
        number = int(step.split()[0])
        inputs = make_inputs(number, shape, device)
        x, weights, chosen = inputs[0]
        some = slice(0, 64)  # the reference decodes an expert at a time
        exact = nvfp4_experts_reference(x[some].float(), weights[some], chosen[some], *stacks).double()
        row = {"tokens": number}
        for name, call in calls.items():
            error = (call(x, weights, chosen)[some].double() - exact).norm() / exact.norm()
            row[name] = {"us": time_kernel(call, inputs), "error": error.item()}
        result.content["times"].append(row)
        parts = (f"{name} {row[name]['us']:.1f} us (error {row[name]['error']:.1e})" for name in calls)
        print(f"{number} tokens: " + ", ".join(parts), flush=True)


if __name__ == "__main__":
    main()
