"""Measures rollout speed in vLLM: NVFP4 with the adapter in the layers, against stock bf16 with
LoRA.

    python benchmarks/bench_rollout.py --shape 7B --json benchmarks/results/rollout_7b_h200.json
    python benchmarks/bench_rollout.py --shape tiny --sequences 2 --generated 4    # to try it on the CPU

Models have random weights and LoRA rank 32 on every linear layer; prompts have 256 random tokens,
and 256 tokens are generated, with CUDA graphs as verl sets them. Where the adapter is in the
layers, the
cost of the noise is also measured: one more pair of calls with noise on and off, and the time to
apply it. Each variant is a process of its own, and every time is the better of two calls after a
warm-up. ``tokens_per_s`` counts generated tokens over the whole call, with prefill.
``decode_tokens_per_s`` counts the tokens after each sequence's first, over the time of the call
minus that of a call that generates one token. Prefill is 32 prompts of 256 tokens with one
generated token.
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

from qerl_verl.job import JOB_ENV, Job

PROMPT, GENERATED, PREFILL = 256, 256, 8192
VARIANTS = {
    "bf16": {"base": "bf16", "lora": None},
    "bf16_lora": {"base": "bf16", "lora": "punica"},
    "nvfp4_lora": {"base": "nvfp4", "lora": "inline", "kernel": "auto"},
    "nvfp4_punica": {"base": "nvfp4", "lora": "punica", "kernel": "auto"},
    "nvfp4_marlin_lora": {"base": "nvfp4", "lora": "inline", "kernel": "marlin"},
    "nvfp4_marlin_punica": {"base": "nvfp4", "lora": "punica", "kernel": "marlin"},
}


def run_variant(name: str, args: argparse.Namespace) -> dict:
    """Measures one variant, in its own process."""
    settings = VARIANTS[name]
    import torch
    from shapes import DEVICE, RANK, SHAPES, write_adapter, write_config, write_nvfp4

    work = Path(args.work)
    quantized = settings["base"] == "nvfp4"
    model = work / f"{args.shape}-{settings['base']}"
    if not (model / "config.json").exists():
        (write_nvfp4 if quantized else lambda f, s: write_config(f, s, False))(model, args.shape)
    adapter = work / f"{args.shape}-adapter"
    if settings["lora"] and not (adapter / "adapter_config.json").exists():
        write_adapter(adapter, args.shape, str(model))
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        extra = {
            "gpu_memory_utilization": 0.85,
            "compilation_config": {
                "cudagraph_mode": "FULL_AND_PIECEWISE",
                "cudagraph_capture_sizes": sorted({1, 2, 4, *args.sequences}),
            },
        }
    else:
        extra = {"enforce_eager": True}

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if quantized:
        inline = settings["lora"] == "inline"
        lora = {"rank": RANK, "alpha": RANK} if inline else None
        extra["additional_config"] = {"qerl": {"kernel": settings["kernel"], "lora": lora, "noise": inline}}
        extra["worker_extension_cls"] = "qerl_verl.rollout.worker.QeRLWorkerExtension"
        if "compilation_config" in extra:
            from qerl_verl.config.rules import COMPILATION

            extra["compilation_config"] |= json.loads(COMPILATION)  # as the switch sets it
    else:
        extra["load_format"] = "dummy"
    if settings["lora"] == "punica":
        extra |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK}
    begin = time.perf_counter()
    llm = LLM(
        model=str(model), skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=max(args.sequences),
        max_num_batched_tokens=PREFILL, enable_prefix_caching=False, seed=0,
        tensor_parallel_size=args.tensor_parallel, **extra,
    )  # fmt: skip
    start_s = time.perf_counter() - begin
    request = LoRARequest("policy", 1, str(adapter)) if settings["lora"] == "punica" else None
    if settings["lora"] == "inline":
        llm.collective_rpc("qerl_load_adapter_folder", args=(str(adapter),))

    generator = torch.Generator().manual_seed(0)

    def call(sequences: int, prompt: int, generated: int) -> float:
        prompts = [
            {
                "prompt_token_ids": torch.randint(
                    100, SHAPES[args.shape]["vocab_size"] - 100, (prompt,), generator=generator
                ).tolist()
            }
            for _ in range(sequences)
        ]
        parameters = SamplingParams(
            temperature=1.0, max_tokens=generated, min_tokens=generated, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        outputs = llm.generate(prompts, parameters, lora_request=request, use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert sum(len(o.outputs[0].token_ids) for o in outputs) == sequences * generated
        return seconds

    result = {"variant": name, "start_s": start_s, "decode": {}, "settings": settings}
    for sequences in args.sequences:
        call(sequences, PROMPT, 16)
        seconds = min(call(sequences, PROMPT, args.generated) for _ in range(2))
        first = min(call(sequences, PROMPT, 1) for _ in range(2))
        result["decode"][sequences] = {
            "tokens_per_s": sequences * args.generated / seconds,
            "decode_tokens_per_s": sequences * (args.generated - 1) / (seconds - first),
            "seconds": seconds,
            "first_token_s": first,
        }
    if settings["lora"] == "inline":
        measured = 64 if 64 in args.sequences else args.sequences[-1]
        call(measured, PROMPT, 16)
        clean = min(call(measured, PROMPT, args.generated) for _ in range(2))
        begin = time.perf_counter()
        llm.collective_rpc("qerl_set_noise", args=(42, 1, 1e-2))
        first_s = time.perf_counter() - begin
        begin = time.perf_counter()
        llm.collective_rpc("qerl_set_noise", args=(42, 2, 1e-2))
        set_s = time.perf_counter() - begin
        noisy = min(call(measured, PROMPT, args.generated) for _ in range(2))
        result["noise"] = {"sequences": measured, "off_s": clean, "on_s": noisy, "first_set_s": first_s, "set_s": set_s}
        llm.collective_rpc("qerl_set_noise", args=(42, 2, 0.0))
    call(PREFILL // PROMPT, PROMPT, 1)
    result["prefill_s"] = min(call(PREFILL // PROMPT, PROMPT, 1) for _ in range(3))
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of this script except shape and variants."""
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share the model")
    parser.add_argument("--generated", type=int, default=GENERATED, help="tokens a sequence")
    parser.add_argument("--work", default="/tmp/qerl-bench", help="where the random models are written")
    parser.add_argument("--json", type=Path)


def run_variants(args: argparse.Namespace, baseline: str) -> ResultFile:
    """Runs each variant in a process of its own and prints a line for it.

    Returns:
        The file, with the ratios to ``baseline`` where that was measured.
    """
    out = {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:]),
        "shape": args.shape,
        "gpu": (gpu_names() or ["none"])[0],
        "tensor_parallel": args.tensor_parallel,
        "versions": {p: version(p) for p in ("vllm", "torch", "verl", "transformers")},
        "runs": [],
    }
    with ResultFile(args.json, out) as result:
        for name in result.steps(args.variants):
            if run := start_variant(name, args):
                result.content["runs"].append(run)
                add_ratios(result.content, baseline)
            else:
                result.fail(name, "failed, see its output")
    for name, ratios in result.content.get(f"ratio_to_{baseline}", {}).items():
        print(f"{name:20} " + "  ".join(f"{k}: {v:.2f}x" for k, v in ratios.items()), flush=True)
    return result


def start_variant(name: str, args: argparse.Namespace) -> dict | None:
    """Runs a variant in a process of its own, prints a line for it, and returns its result."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    environment["VLLM_PLUGINS"] = "qerl"
    environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    environment.pop(JOB_ENV, None)
    if VARIANTS[name]["base"] == "nvfp4":
        environment |= Job().environment()
    command = [sys.executable, __file__, "--variant", name, "--shape", args.shape, "--work", args.work]
    command += ["--sequences", *map(str, args.sequences), "--generated", str(args.generated)]
    command += ["--tensor-parallel", str(args.tensor_parallel)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = done.stdout.splitlines()
    print("\n".join(line for line in lines if "[qerl]" in line), flush=True)
    found = [line for line in lines if line.startswith("RESULT ")]
    if done.returncode or not found:
        print("\n".join(lines[-20:]), f"{name} failed with {done.returncode}", flush=True)
        return None
    run = json.loads(found[0].removeprefix("RESULT "))
    speeds = "  ".join(f"{s}: {d['tokens_per_s']:.0f}" for s, d in run["decode"].items())
    print(
        f"{name:20} start {run['start_s']:.0f} s  tokens/s {speeds}  prefill {run['prefill_s'] * 1e3:.1f} ms",
        flush=True,
    )
    return run


def add_ratios(out: dict, baseline: str) -> None:
    """Adds the ratio of each variant of :func:`run_variants` to ``baseline``, if that was
    measured."""
    runs = {r["variant"]: r for r in out["runs"] if "decode" in r}
    if base := runs.get(baseline):
        out[f"ratio_to_{baseline}"] = {
            name: {
                **{s: d["tokens_per_s"] / base["decode"][s]["tokens_per_s"] for s, d in run["decode"].items()},
                **{
                    f"decode {s}": d["decode_tokens_per_s"] / base["decode"][s]["decode_tokens_per_s"]
                    for s, d in run["decode"].items()
                },
                "prefill": base["prefill_s"] / run["prefill_s"],
            }
            for name, run in runs.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--variants", nargs="*", default=["bf16_lora", "nvfp4_lora"], choices=VARIANTS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.variant:
        print("RESULT " + json.dumps(run_variant(args.variant, args)), flush=True)
        return
    sys.exit(run_variants(args, "bf16_lora").exit_code)


if __name__ == "__main__":
    main()
