"""Measures the cost of norms that take noise in vLLM, and checks the noise that acts on the device.

    python benchmarks/bench_noise.py --json benchmarks/results/noise_7b.json
    python benchmarks/bench_noise.py --shape tiny --sequences 2 --generated 8 --rounds 1  # on a CPU

An engine whose norms take noise (``qerl.aqn.enable=True``) is compared with one that has vLLM's own
norms. Each is a process of its own, and the two alternate. The model is NVFP4 with random weights
and the adapter in the layers; prompts have 256 random tokens. The engines run with CUDA graphs as
verl sets them, and then with ``enforce_eager``. The decoding time is the better of ``--repeats``
calls, minus a call that generates one token. Checks:

- Without noise both engines give the same log-probabilities, bit for bit (``off_is_stock``), also
  after noise was on and off (``off_again``). Noise changes them (``graphs_see_noise``), and the
  same noise changes them in the same way.
- Standard deviation and mean of the acting noise are measured for the first and the last sigma of
  the default schedule. They follow from the change of the effective weight (least squares of a
  norm's outputs on its normalized inputs), by vLLM's operators one by one, by the kernel of eager
  engines, and compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from result_file import ResultFile, gpu_names

from qerl_verl.job import Job

PROMPT, BATCHED = 256, 8192
SIGMAS = (1e-2, 5e-4)


def make_probe():
    """Returns a function for ``collective_rpc``; a worker cannot import this file."""

    def probe(worker, sigma, rows, path):
        import torch
        from vllm import ir

        from qerl_verl.aqn.noise import Noise

        model = worker.model_runner.get_model()
        device = next(model.parameters()).device
        injector = worker._qerl_noise_injector()

        def forward_of(norm):
            if path == "compiled":
                return torch.compile(norm.forward_native, dynamic=False)
            return norm.forward_cuda if path == "kernel" else norm.forward_native

        def slopes(norm, seed):
            generator, found = torch.Generator(device).manual_seed(seed), []
            forward, dtype = forward_of(norm), norm.weight.dtype
            for _ in range(2):
                numerator = denominator = 0
                for _ in range(rows // 2048):
                    x = torch.randn(1024, norm.hidden_size, generator=generator, device=device)
                    x = x.to(dtype)
                    square = x.float().square().mean(-1, keepdim=True)
                    unit = x.float() * (square + norm.variance_epsilon).rsqrt()
                    y, _ = forward(x.clone(), torch.zeros_like(x))
                    numerator = numerator + (y.double() * unit).sum(0)
                    denominator = denominator + unit.double().square().sum(0)
                found.append(numerator / denominator)
            return torch.stack(found)

        changes = []
        with ir.enable_torch_wrap(path != "compiled"), torch.no_grad():
            for seed, name in enumerate(list(injector.targets)[:8]):
                injector.set_noise(Noise(7, 1, sigma))
                norm = model.get_submodule(name)
                noised = slopes(norm, seed)
                norm.qerl_weight.copy_(norm.weight)
                changes.append(noised - slopes(norm, seed))
                torch._dynamo.reset()
        injector.set_noise(Noise(7, 1, 0.0))
        first, second = torch.cat(changes, dim=1)
        both = (first + second) / 2
        # the covariance of the halves excludes what rounding the outputs adds to each
        variance = ((first - first.mean()) * (second - second.mean())).mean()
        return {
            "sigma": sigma,
            "std_over_sigma": variance.clamp(min=0).sqrt().item() / sigma,
            "mean_over_error": (both.mean() / (both.std() / both.numel() ** 0.5)).item(),
            "channels": both.numel(),
        }

    return probe


def run_engine(noise: bool, eager: bool, args: argparse.Namespace) -> dict:
    """Measures one engine, in a process of its own."""
    import torch
    from shapes import DEVICE, RANK, SHAPES, write_adapter, write_nvfp4

    model, adapter = (
        Path(args.work) / f"{args.shape}-nvfp4",
        Path(args.work) / f"{args.shape}-adapter",
    )
    if not (model / "config.json").exists():
        write_nvfp4(model, args.shape)
    if not (adapter / "adapter_config.json").exists():
        write_adapter(adapter, args.shape, str(model))
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    extra: dict = {"enforce_eager": True}
    if DEVICE == "cuda":
        extra = {"gpu_memory_utilization": 0.85} | (extra if eager else {})
        if not eager:
            from qerl_verl.config.rules import COMPILATION

            sizes = {
                "cudagraph_mode": "FULL_AND_PIECEWISE",
                "cudagraph_capture_sizes": sorted({1, 2, 4, *args.sequences}),
            }
            extra["compilation_config"] = sizes | json.loads(COMPILATION)

    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=max(args.sequences),
        max_num_batched_tokens=BATCHED,
        enable_prefix_caching=False,
        seed=0,
        worker_extension_cls="qerl_verl.rollout.worker.QeRLWorkerExtension",
        additional_config={"qerl": {"kernel": "auto", "lora": {"rank": RANK, "alpha": RANK}, "noise": noise}},
        **extra,
    )
    result: dict = {
        "noise": noise,
        "eager": eager,
        "start_s": time.perf_counter() - begin,
        "decode_s": {},
    }
    llm.collective_rpc("qerl_load_adapter_folder", args=(str(adapter),))

    def make_prompts(count: int, length: int, seed: int) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        top = SHAPES[args.shape]["vocab_size"] - 100
        tokens = torch.randint(100, top, (count, length), generator=generator).tolist()
        return [{"prompt_token_ids": t} for t in tokens]

    def log_probabilities() -> list[float]:
        """Returns those of greedy tokens, through the graphs of decoding, and those of the
        prompts."""
        parameters = SamplingParams(
            temperature=0,
            max_tokens=24,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
            detokenize=False,
        )
        found = []
        # one after the other: arrival decides which prompts share a step, and steps decide
        # roundings
        prompts = make_prompts(min(4, max(args.sequences)), 64, 1)
        for output in (llm.generate([prompt], parameters, use_tqdm=False)[0] for prompt in prompts):
            prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            found += [place[token].logprob for token, place in prompt]
            found += [next(iter(place.values())).logprob for place in output.outputs[0].logprobs]
        return found

    def call(sequences: int, generated: int) -> float:
        parameters = SamplingParams(
            temperature=1.0,
            max_tokens=generated,
            min_tokens=generated,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = make_prompts(sequences, PROMPT, sequences)
        begin = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - begin

    def set_noise(step: int, sigma: float) -> list:
        return llm.collective_rpc("qerl_set_noise", args=(42, step, sigma))

    result["log_probabilities"] = off = log_probabilities()
    result["repeats_itself"] = log_probabilities() == off
    if noise:
        begin = time.perf_counter()
        (result["acting"],) = set_noise(1, 1e-2)
        result["set_s"] = time.perf_counter() - begin
        on = log_probabilities()
        set_noise(2, 1e-2)
        other = log_probabilities()
        set_noise(1, 1e-2)
        result["graphs_see_noise"] = on != off and other not in (on, off) and log_probabilities() == on
        set_noise(1, 0.0)
        result["off_again"] = log_probabilities() == off
        if not eager:
            result["probes"] = []
            for path in ("native", "kernel", "compiled") if DEVICE == "cuda" else ("native",):
                for sigma in SIGMAS:
                    try:
                        (found,) = llm.collective_rpc(make_probe(), args=(sigma, args.rows, path))
                    except Exception as error:
                        found = {"sigma": sigma, "failed": f"{type(error).__name__}: {error}"[:300]}
                    result["probes"].append(found | {"path": path})
        set_noise(1, 1e-2)
    for sequences in args.sequences:
        call(sequences, 16)
        whole = min(call(sequences, args.generated) for _ in range(args.repeats))
        first = min(call(sequences, 1) for _ in range(args.repeats))
        result["decode_s"][sequences] = whole - first
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--generated", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", default=["graphs", "eager"], choices=["graphs", "eager"])
    parser.add_argument("--rounds", type=int, default=2, help="engines of each kind with CUDA graphs")
    parser.add_argument(
        "--rows",
        type=int,
        default=16384,
        help="inputs of a norm whose effective weight is measured",
    )
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further engine is started")
    parser.add_argument("--work", default="/tmp/qerl-bench", help="where the random models are written")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        noise, eager = (text == "True" for text in args.engine)
        print("RESULT " + json.dumps(run_engine(noise, eager, args)), flush=True)
        return

    begin = time.monotonic()
    out = {
        "command": "python benchmarks/bench_noise.py " + " ".join(sys.argv[1:]),
        "shape": args.shape,
        "gpu": (gpu_names() or ["none"])[0],
        "versions": {p: version(p) for p in ("vllm", "torch", "verl")},
        "engines": [],
    }
    environment = {
        **os.environ,
        **Job().environment(),
        "VLLM_PLUGINS": "qerl",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    environment |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    if out["gpu"] == "none":
        from qerl_verl.config.rules import CPU_ENVIRONMENT

        environment |= CPU_ENVIRONMENT
    environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    kinds = {}
    for number in range(args.rounds if "graphs" in args.kinds else 0):
        kinds |= {f"noise {number + 1}": (True, False), f"vLLM's {number + 1}": (False, False)}
    if "eager" in args.kinds:
        kinds |= {"noise, eager": (True, True), "vLLM's, eager": (False, True)}
    with ResultFile(args.json, out) as result:
        for name in result.steps(kinds):
            noise, eager = kinds[name]
            if time.monotonic() - begin > args.budget:
                result.fail(name, f"was left out: {args.budget:.0f} s are over")
                continue
            command = [
                sys.executable,
                __file__,
                "--engine",
                str(noise),
                str(eager),
                "--shape",
                args.shape,
                "--work",
                args.work,
            ]
            command += [
                "--sequences",
                *map(str, args.sequences),
                "--generated",
                str(args.generated),
                "--rows",
                str(args.rows),
            ]
            command += ["--repeats", str(args.repeats)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                print("\n".join(done.stdout.splitlines()[-20:]), flush=True)
                result.fail(name, f"ended with exit code {done.returncode}")
                continue
            result.content["engines"].append(json.loads(found[0].removeprefix("RESULT ")))
            summarize(result.content)
    print("\n".join(table(result.content)), flush=True)
    sys.exit(result.exit_code)


def summarize(out: dict) -> None:
    """Compares the engines of each kind, and stores the result in ``out``."""
    for eager in (False, True):
        ran = [e for e in out["engines"] if e["eager"] is eager and "failed" not in e]
        ours, stock = ([e for e in ran if e["noise"] is noise] for noise in (True, False))
        if not ours or not stock:
            continue
        cost = {}
        for sequences in ours[0]["decode_s"]:
            best = [min(e["decode_s"][sequences] for e in engines) for engines in (ours, stock)]
            worst = max(e["decode_s"][sequences] for e in stock)
            cost[sequences] = {
                "percent": 100 * (best[0] / best[1] - 1),
                "stock_spread": 100 * (worst / best[1] - 1),
            }
        reference = stock[0]["log_probabilities"]
        differences = [abs(a - b) for e in ours for a, b in zip(e["log_probabilities"], reference, strict=True)]
        out["eager" if eager else "graphs"] = {
            "cost": cost,
            "off_is_stock": max(differences) == 0,
            "largest_difference": max(differences),
            "stock_is_stock": all(e["log_probabilities"] == reference for e in stock),
            **{key: all(e[key] for e in ours) for key in ("graphs_see_noise", "off_again", "repeats_itself")},
        }


def table(out: dict) -> list[str]:
    lines = [
        f"{out['shape']} on {out['gpu']}, " + ", ".join(f"{name} {number}" for name, number in out["versions"].items())
    ]
    for kind in ("graphs", "eager"):
        if found := out.get(kind):
            cost = "  ".join(
                f"{s}: {c['percent']:+.2f} % (spread {c['stock_spread']:.2f})" for s, c in found["cost"].items()
            )
            lines.append(f"{kind}: decoding with noise against vLLM's norms, by sequences  {cost}")
            checks = {key: value for key, value in found.items() if key != "cost"}
            lines.append(f"{kind}: " + "  ".join(f"{key}={value}" for key, value in checks.items()))
    for engine in out["engines"]:
        if "set_s" in engine:
            lines.append(f"putting noise on takes {1e3 * engine['set_s']:.0f} ms; acting: {engine['acting']}")
        for probe in engine.get("probes", ()):
            lines.append(
                "  " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in probe.items())
            )
    return lines


if __name__ == "__main__":
    main()
