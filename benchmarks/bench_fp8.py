"""FP8 GEMMs against bfloat16 ones on the same NVFP4 weights, and what the rounding does to a
policy.

No setting chooses FP8: docs/performance-trials.md tells why. :class:`FP8Backend` is how a layer would
compute in it.

    python benchmarks/bench_fp8.py --json benchmarks/results/fp8_h100.json

Parts:

* ``gemm``: one projection of Qwen2.5-7B, forward and backward, in microseconds. ``cublas``: a
  bfloat16 weight. ``nvfp4``: the kernels that qerl.kernel=auto takes, measured launches.
  ``fp8_resident``: quantizing x, and the FP8 GEMM on a weight kept in E4M3, as the rollout does;
  ``fp8_decoded``: with the decoding in front, as the actor does; ``..._fast``: sums in the tensor
  cores' own accumulators. ``..._lora``: with an adapter of rank 32. Backward is dL/dx alone;
  ``backward_fp8_gemm`` is what it
  would take in FP8 without the decoding: dL/dy times the channels' powers of two, rounded by token.
  Errors are relative, against
  float64: of the kernel (``of_kernel``) against what FP8 compute is defined as, and of that
  definition against the unrounded layer (``of_rounding``).
* ``logprobs``: a random model with an adapter, its tokens sampled from its own distribution: k3
  estimate of the KL divergence between the log-probabilities of two ways to compute it.

Times are medians over replays of CUDA graphs whose calls rotate through copies of the weight, see
bench_gemm.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from bench_gemm import ALPHA, ENDS, RANK, ROTATE_BYTES, SHAPES, environment, time_calls

from qerl_verl.kernels import portable
from qerl_verl.kernels.backends import BACKENDS, Backend, choose_backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_fp8_linear import nvfp4_fp8_linear_reference, nvfp4_to_fp8_reference, through_fp8
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference

DEVICE = torch.device("cuda", 0)
TOKENS = (1, 16, 64, 128, 256, 1024, 8192)
PROJECTIONS = ("7B qkv", "7B o", "7B gate_up", "7B down")


class FP8Backend(Backend):
    """An NVFP4 layer on FP8 tensor cores (compute capability 8.9 and later), as
    ``kernels/nvfp4_fp8_linear.py`` defines it.

    A weight is a pair as of every backend, decoded for each GEMM, or what :meth:`reside` makes of
    one, which takes 1 byte a weight.
    """

    name = "fp8"

    def reside(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weight in E4M3 ``[N, K]``, and the powers of two of its rows ``[N]``."""
        return portable.nvfp4_to_fp8(packed, scale)

    def block_values(self, packed, scale, dtype):
        return portable.nvfp4_through_fp8(packed, scale).to(dtype)

    def linear(self, x, packed, scale, alpha, bias=None):
        weight = (packed, scale) if packed.dtype == torch.float8_e4m3fn else self.reside(packed, scale)
        return portable.fp8_gemm(x, *weight, alpha, bias)

    def dequantizes(self, tokens, n, k):
        return False


class FP8InBfloat16(FP8Backend):
    """The same policy, multiplied by cuBLAS in bfloat16."""

    def linear(self, x, packed, scale, alpha, bias=None):
        return nvfp4_fp8_linear_reference(x, *self.reside(packed, scale), alpha, bias)


def random_weight(n: int, k: int):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(n, k // 16, device=DEVICE) * 300 + 20).to(torch.float8_e4m3fn).view(torch.uint8)
    return packed, scale


def copies(nbytes: int) -> int:
    return max(2, math.ceil(ROTATE_BYTES / nbytes))


def floor_us(m: int, n: int, k: int) -> float:
    """About what a GEMM takes, so that graphs are long enough."""
    return max(n * k / 4e6, 2 * m * n * k / 1.5e9)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def measure_gemm(name: str, tokens, out: dict) -> None:
    n, k = SHAPES[name]
    ends = ENDS.get(name, (n,))
    nvfp4, fp8 = choose_backend(DEVICE, (n, k), candidates=BACKENDS).backend, FP8Backend()
    for ends_ in (None, ends):
        nvfp4.tune(DEVICE, n, k, ends_, RANK)
    packed, scale = random_weight(n, k)
    number = copies(n * k * 9 // 16)
    plain = [(packed, scale)] + [(packed.clone(), scale.clone()) for _ in range(number - 1)]
    laid_out = [nvfp4.prepack(*weight) for weight in plain]
    resident = [fp8.reside(*weight) for weight in plain[: copies(n * k)]]
    dense = [torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies(n * k * 2))]
    a = torch.randn(len(ends) * RANK, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5
    b = torch.randn(n, RANK, device=DEVICE, dtype=torch.bfloat16) * 0.1
    b_laid_out = nvfp4.prepack_lora_b(b)
    decode = {
        "decode_to_fp8": time_calls(lambda i: portable.nvfp4_to_fp8(*plain[i]), number, n * k / 3e6),
        "decode_through_fp8": time_calls(lambda i: portable.nvfp4_through_fp8(*plain[i]), number, n * k / 2e6),
        "dequantize": time_calls(lambda i: nvfp4.block_values(*laid_out[i], torch.bfloat16), number, n * k / 2e6),
    }
    out["decode"].append({"shape": name, "n": n, "k": k, "us": decode})
    print(name, {key: round(value, 1) for key, value in decode.items()}, flush=True)
    for m in tokens:
        row = {"shape": name, "n": n, "k": k, "m": m}
        row |= measure_tokens(m, nvfp4, plain, laid_out, resident, dense, (a, b, b_laid_out, ends))
        out["gemm"].append(row)
        print(f"{name:10} {m:5}", {key: round(value, 1) for key, value in row["us"].items()}, flush=True)
        print(" " * 16, {key: f"{value:.2e}" for key, value in row["error"].items()}, flush=True)


def measure_tokens(m: int, nvfp4, plain, laid_out, resident, dense, adapter) -> dict:
    """Returns times and errors of one weight, of which there are copies in each form, for ``m``
    tokens."""
    (n, k), fp8 = dense[0].shape, FP8Backend()
    a, b, b_laid_out, ends = adapter
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
    about = floor_us(m, n, k)

    def timed(call, weights):
        return time_calls(call, len(weights), about, 5)

    def forward(weights, fast):
        portable.FAST_ACCUMULATION = fast
        try:
            return timed(lambda i: fp8.linear(x, *weights[i], ALPHA, bias), weights)
        finally:
            portable.FAST_ACCUMULATION = False

    codes, row_scale = portable.fp8_quantize(x, ALPHA)
    transposed = [(weight.t().contiguous(), scale) for weight, scale in resident]
    us = {
        "cublas": timed(lambda i: torch.addmm(bias, x, dense[i].t()), dense),
        "nvfp4": timed(lambda i: nvfp4.linear(x, *laid_out[i], ALPHA, bias), laid_out),
        "fp8_resident": forward(resident, False),
        "fp8_resident_fast": forward(resident, True),
        "fp8_decoded": forward(plain, False),
        "quantize": time_calls(lambda i: portable.fp8_quantize(x, ALPHA), 2, max(2.0, m * k / 2e6)),
        "fp8_gemm_alone": timed(
            lambda i: torch._scaled_mm(
                codes,
                resident[i][0].t(),
                scale_a=row_scale[:, None],
                scale_b=resident[i][1][None],
                out_dtype=torch.bfloat16,
            ),
            resident,
        ),
        "backward_cublas": timed(lambda i: grad @ dense[i], dense),
        "backward_nvfp4": timed(lambda i: grad @ nvfp4.block_values(*laid_out[i], torch.bfloat16), laid_out),
        "backward_fp8_gemm": timed(lambda i: backward_in_fp8(grad, *transposed[i]), transposed),
        "backward_fp8": timed(lambda i: grad @ fp8.block_values(*plain[i], torch.bfloat16), plain),
    }
    if m <= 1024:
        lora = (a, b, ends, 1.0)
        us["cublas_lora"] = timed(lambda i: add_lora_reference(torch.addmm(bias, x, dense[i].t()), x, *lora), dense)
        us["nvfp4_lora"] = timed(
            lambda i: nvfp4.lora_linear(x, *laid_out[i], ALPHA, bias, a, b_laid_out, ends, 1.0), laid_out
        )
        us["fp8_resident_lora"] = timed(lambda i: fp8.lora_linear(x, *resident[i], ALPHA, bias, *lora), resident)
    return {"us": us, "error": errors(x, grad, bias, *plain[0], fp8)}


def backward_in_fp8(grad, codes_t, channel):
    """dL/dx with E4M3 on both sides: ``codes_t`` is ``[K, N]``, the weight's codes transposed,
    ``channel`` their scales ``[N]``."""
    rounded, scale = portable.fp8_quantize(grad * channel.bfloat16(), ALPHA)
    ones = torch.ones(1, codes_t.shape[0], device=DEVICE)
    return torch._scaled_mm(
        rounded, codes_t.t(), scale_a=scale[:, None], scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def errors(x, grad, bias, packed, scale, fp8, rows: int = 2048, tokens: int = 512) -> dict:
    """Returns the relative errors against float64: of outputs on the first channels, of dL/dx for
    all of them."""
    x, grad = x[:tokens], grad[:tokens, : len(packed)]
    few = packed[:rows], scale[:rows]
    weight = block_values_nvfp4(*few, torch.float64)
    exact = x.double() @ weight.t() * ALPHA + bias[:rows].double()
    codes = nvfp4_to_fp8_reference(*few)
    defined = nvfp4_fp8_linear_reference(x.double(), *codes, ALPHA, bias[:rows])
    got = fp8.linear(x, packed, scale, ALPHA, bias)[:, :rows]
    rounded = through_fp8(*codes, torch.float64)
    out = {
        "of_kernel": relative(got, defined),
        "of_rounding": relative(defined, exact),
        "of_weight_rounding": relative(rounded, weight),
    }
    portable.FAST_ACCUMULATION = True
    out["of_kernel_fast"] = relative(fp8.linear(x, packed, scale, ALPHA, bias)[:, :rows], defined)
    portable.FAST_ACCUMULATION = False
    part = grad[:, :rows]
    exact = part.double() @ weight
    out["of_gradient"] = relative(part @ fp8.block_values(*few, torch.bfloat16), part.double() @ rounded)
    out["of_gradient_rounding"] = relative(part.double() @ rounded, exact)
    codes_t = codes[0].t().contiguous()
    out["of_gradient_in_fp8"] = relative(backward_in_fp8(part, codes_t, codes[1]), part.double() @ rounded * ALPHA)
    return out


def k3(p: torch.Tensor, q: torch.Tensor) -> float:
    """Estimates of KL(p || q) from log-probabilities of tokens that p sampled, as verl's
    rollout_corr/k3_kl."""
    difference = (q - p).double()
    return (difference.exp() - difference - 1).mean().item()


@torch.no_grad()
def measure_logprobs(shape: str, layers: int | None, out: dict, sequences: int = 16, length: int = 256) -> None:
    """Returns k3 between ways to compute one model; noise of sampling is that of
    ``sequences * length`` tokens."""
    from bench_training import build

    from qerl_verl.nvfp4.linear import NVFP4Linear

    model, _ = build("nvfp4", shape, layers, torch.bfloat16)
    model.eval()
    model.gradient_checkpointing_disable()
    linears = [module for module in model.modules() if isinstance(module, NVFP4Linear)]
    natural = [module.backend for module in linears]
    kept = [tuple(t.clone() for t in module.backend.unpack(*module.weight_bytes())) for module in linears]

    def use(backends) -> None:
        for module, backend, (packed, scale) in zip(linears, backends, kept, strict=True):
            module.place(*backend.prepack(packed, scale)) if module._placed is None else None
            module._placed, module.backend = backend.prepack(packed, scale), backend

    torch.manual_seed(3)
    ids = torch.randint(0, model.config.vocab_size, (sequences, length), device=DEVICE)

    def logits(batch: int, fast: bool = False) -> torch.Tensor:
        portable.FAST_ACCUMULATION = fast
        with torch.autocast("cuda", torch.bfloat16):
            parts = [
                model(input_ids=ids[i : i + batch], use_cache=False).logits.float() for i in range(0, sequences, batch)
            ]
        portable.FAST_ACCUMULATION = False
        return torch.cat(parts).log_softmax(-1).flatten(0, 1)

    ways = {
        "nvfp4": (natural, sequences, False),
        "nvfp4, one sequence at a time": (natural, 1, False),
        "nvfp4, pytorch": ([get_backend("pytorch")] * len(linears), sequences, False),
        "fp8": ([FP8Backend()] * len(linears), sequences, False),
        "fp8, one sequence at a time": ([FP8Backend()] * len(linears), 1, False),
        "fp8, in bfloat16": ([FP8InBfloat16()] * len(linears), sequences, False),
        "fp8, fast accumulation": ([FP8Backend()] * len(linears), sequences, True),
    }
    found = {}
    for name, (backends, batch, fast) in ways.items():
        use(backends)
        logprobs = logits(batch, fast)
        if not found:
            tokens = torch.multinomial(logprobs.exp(), 1)
        found[name] = logprobs.gather(1, tokens).squeeze(1)
        del logprobs
    pairs = [
        ("nvfp4", "nvfp4, one sequence at a time"),
        ("nvfp4", "nvfp4, pytorch"),
        ("fp8", "fp8, one sequence at a time"),
        ("fp8", "fp8, in bfloat16"),
        ("fp8, fast accumulation", "fp8, in bfloat16"),
        ("nvfp4", "fp8"),
    ]
    result = {f"{first} against {second}": k3(found[first], found[second]) for first, second in pairs}
    entropy = -found["nvfp4"].mean().item()
    out["logprobs"].append(
        {
            "shape": shape,
            "layers": model.config.num_hidden_layers,
            "tokens": sequences * length,
            "k3": result,
            "entropy": entropy,
        }
    )
    print(shape, layers, f"{entropy:.2f} nats", {key: f"{value:.2e}" for key, value in result.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["gemm", "logprobs"], choices=["gemm", "logprobs"])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, help="projections")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS), help="of the part gemm")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further shape after so many")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out = environment() | {"command": "python " + " ".join(["benchmarks/bench_fp8.py", *sys.argv[1:]])}
    out |= {"gemm": [], "decode": [], "logprobs": []}
    start = time.monotonic()
    steps = []
    if "gemm" in args.parts:
        steps += [lambda name=name: measure_gemm(name, args.tokens, out) for name in args.shapes or PROJECTIONS]
    if "logprobs" in args.parts:
        steps += [lambda layers=layers: measure_logprobs("7B", layers, out) for layers in (2, 28)]
    for step in steps:
        if time.monotonic() - start > args.seconds:
            print("no time left", flush=True)
            break
        step()
        torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
