"""Measures time and peak memory of the experts of one layer in training, NVFP4 against bf16.

    python benchmarks/bench_experts_training.py --json benchmarks/results/experts_training_h100.json
    python benchmarks/bench_experts_training.py --shape tiny-moe --tokens 64      # on the CPU, in float32

The shape is that of one layer of Qwen3-30B-A3B: 128 experts, 8 for each token, random weights and a
random router. ``nvfp4`` is :class:`qerl_verl.nvfp4.experts.NVFP4Experts` with the kernels of
``qerl.kernel=auto``. ``nvfp4_compiled`` also compiles the activation, as verl's
``use_torch_compile`` does. ``bf16`` is transformers' own module with its default implementation
(grouped_mm) on the decoded weights. The backward pass computes the gradients of the tokens and of
the router's weights. Peak memory is the memory of a call beside weights and inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.metadata import version

import torch
from result_file import ResultFile
from shapes import SHAPES, config
from torch import nn

VARIANTS = ("bf16", "nvfp4", "nvfp4_compiled")


def build(variant: str, settings, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Returns experts on the device. All variants have the same weights."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from qerl_verl.nvfp4.experts import PROJECTIONS, STACKS, NVFP4Experts, gated

    count, hidden, inner = settings.num_experts, settings.hidden_size, settings.moe_intermediate_size
    experts = NVFP4Experts(count, hidden, inner, nn.SiLU(), device=device)
    generator = torch.Generator(device).manual_seed(0)
    for stack in STACKS:
        packed, scale = experts.weight_bytes(stack)
        packed.random_(0, 256, generator=generator)
        values = torch.rand(scale.shape, generator=generator, device=device) * 300 + 20
        scale.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
    for column in range(len(PROJECTIONS)):
        experts.weight_global_scale[:, column] = 3e4
    if variant == "bf16":
        settings._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            plain = Qwen3MoeExperts(settings)
        for stack in STACKS:
            setattr(plain, stack, nn.Parameter(experts.dequantize(stack, dtype), requires_grad=False))
        return plain
    for choice in experts.use_backend(device, dtype=dtype).values():
        print(f"{variant}: {choice.sentence(device)}", flush=True)
    if variant == "nvfp4_compiled":
        experts.gated = torch.compile(gated, dynamic=True)
    return experts


def measure(module: nn.Module, inputs: tuple, repeats: int) -> dict[str, float]:
    """Returns the median time of forward and backward pass in ms, and the peak memory in GiB."""
    hidden, index, weights = inputs
    on_gpu = hidden.is_cuda
    forward, backward, peak = [], [], 0
    for _ in range(repeats + 2):
        leaves = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
        if on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        y = module(leaves[0], index, leaves[1])
        if on_gpu:
            torch.cuda.synchronize()
        middle = time.perf_counter()
        y.backward(torch.ones_like(y))
        if on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    out = {"forward_ms": statistics.median(forward[2:]) * 1e3, "backward_ms": statistics.median(backward[2:]) * 1e3}
    return out | ({"peak_gib": peak / 2**30} if on_gpu else {})


def main() -> None:
    from transformers import Qwen3MoeConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="30B-A3B", choices=[name for name in SHAPES if "num_experts" in SHAPES[name]]
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings = Qwen3MoeConfig(**{k: v for k, v in config(args.shape).items() if k != "model_type"})
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {package: version(package) for package in ("torch", "transformers")}
    out = {"device": name, "shape": args.shape, "dtype": str(dtype), **versions, "results": []}
    with ResultFile(args.json, out) as result:
        for variant in result.steps(args.variants):
            measure_variant(variant, settings, device, dtype, args, result.content["results"])


def measure_variant(variant: str, settings, device, dtype, args: argparse.Namespace, results: list[dict]) -> None:
    """Adds a row for each number of tokens to ``results``."""
    module = build(variant, settings, device, dtype)
    for tokens in args.tokens:
        generator = torch.Generator(device).manual_seed(1)
        hidden = torch.randn(tokens, settings.hidden_size, generator=generator, device=device).to(dtype)
        scores = torch.rand(tokens, settings.num_experts, generator=generator, device=device)
        weights, index = scores.topk(settings.num_experts_per_tok, -1)
        found = measure(module, (hidden, index, weights.to(dtype)), args.repeats)
        results.append({"variant": variant, "tokens": tokens, **found})
        print(variant, tokens, *(f"{key} {value:.2f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
