"""Measures how far rollout and actor are apart for a mixture of experts, in routing and log-probs.

    python benchmarks/bench_routing.py --json benchmarks/results/routing_30b_h100.json   # one H100
    python benchmarks/bench_routing.py --model FOLDER --json FILE    # a real checkpoint
    python benchmarks/bench_routing.py --dry-run    # tiny, on the CPU

Engine and actor choose experts from slightly different numbers. A vLLM engine samples sequences one
at a time. Then transformers' model, with the actor's layers, computes the same tokens. For each
model the result has:

- ``choices_differ``: fraction of the choices, one for each token and layer, with differing sets of
  experts;
- ``tokens_differ``: fraction of the tokens with another set of experts in at least one layer;
- ``experts_differ``: fraction of the rollout's chosen experts that the actor does not choose;
- ``k3``: mean of exp(r) - 1 - r over the sampled tokens, with r as the difference of their
  log-probabilities;
- ``k3_replayed``: k3 with the rollout's choices replayed in the actor, as
  ``enable_rollout_routing_replay`` does.

A mixture in NVFP4 is measured beside the same weights in bfloat16 and beside a dense model in both,
by default with random weights and few layers. More than three times the dense model's k3 would be a
reason to replay the rollout's routing in the actor. The engine runs eagerly, without CUDA graphs,
because a hook reads the router's outputs.
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

SHAPES_OF_RUN = {"mixture": "30B-A3B-6", "dense": "7B-4"}
SHAPES_OF_DRY_RUN = {"mixture": "tiny-moe", "dense": "tiny"}


def sample(folder: Path, quantized: bool, args: argparse.Namespace) -> dict:
    """Samples with an engine, and records log-probabilities and the router's outputs.

    Returns:
        Lists over the sequences: ``tokens``, ``log_probabilities`` of the sampled tokens, and
        ``routers``, by layer ``[T - 1, E]``, because the last token is sampled but not computed.
    """
    import torch
    from vllm import LLM, SamplingParams

    ours = {"qerl": {"kernel": args.kernel, "lora": None}} if quantized else {}
    settings = {} if torch.cuda.is_available() else {"gpu_memory_utilization": 0.2}  # of the host's memory
    llm = LLM(
        str(folder), skip_tokenizer_init=True, enforce_eager=True, distributed_executor_backend="uni", dtype=args.dtype,
        max_model_len=args.prompt + args.generated, enable_prefix_caching=False, additional_config=ours, seed=0,
        **settings,
    )  # fmt: skip
    seen: dict[str, list[torch.Tensor]] = {}

    def listen(worker) -> int:
        model = worker.model_runner.get_model()
        routers = {name: module for name, module in model.named_modules() if name.endswith(".mlp.gate")}
        for name, router in routers.items():
            seen[name] = []
            router.register_forward_hook(
                lambda module, inputs, output, name=name: seen[name].append(output[0].float().cpu())
            )
        return model.config.vocab_size

    (vocabulary,) = llm.collective_rpc(listen)
    generator = torch.Generator().manual_seed(0)
    parameters = SamplingParams(
        temperature=1.0, max_tokens=args.generated, ignore_eos=True, detokenize=False, logprobs=0
    )
    found = {"tokens": [], "log_probabilities": [], "routers": []}
    for _ in range(args.samples):
        for outputs in seen.values():
            outputs.clear()
        prompt = torch.randint(100, vocabulary - 100, (args.prompt,), generator=generator).tolist()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
        tokens = list(output.outputs[0].token_ids)
        values = [place[token].logprob for token, place in zip(tokens, output.outputs[0].logprobs, strict=True)]
        found["tokens"].append(prompt + tokens)
        found["log_probabilities"].append(torch.tensor(values, dtype=torch.float64))
        found["routers"].append({name: torch.cat(parts) for name, parts in seen.items()})
    return found


def build_actor(folder: Path, quantized: bool, dtype, device):
    """Returns transformers' model with the actor's layers."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if not quantized:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, prepack_linears, swap_linears

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    swap_linears(model, packed_linear_names(folder), dtype)
    load_tensors(model, folder, dtype)
    model = model.to(device).requires_grad_(False).eval()
    print(f"[qerl] kernel: actor NVFP4 linear = {prepack_linears(model, device, dtype=dtype)}", flush=True)
    return model


def compare(folder: Path, quantized: bool, found: dict, args: argparse.Namespace) -> dict:
    """Returns the quantities of the module's docstring."""
    import torch

    from qerl_verl.engine.routing import RoutingReplay

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_actor(folder, quantized, getattr(torch, args.dtype), device)
    top_k, seen = getattr(model.config, "num_experts_per_tok", 0), {}
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.__setitem__(name, output[0].float().cpu())
            )
    ratios, missed, replayed = [], [], []
    replay = (
        RoutingReplay(model, tuple(n for n, _ in model.named_modules() if n.endswith(".mlp.gate"))) if top_k else None
    )

    def log_ratios(tokens, values):
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device=device), use_cache=False).logits[0, :-1]
        ours = logits.float().log_softmax(-1).gather(-1, torch.tensor(tokens[1:], device=device)[:, None])[:, 0]
        return ours[-len(values) :].double().cpu() - values

    for tokens, values, routers in zip(
        *(found[key] for key in ("tokens", "log_probabilities", "routers")), strict=True
    ):
        ratios.append(log_ratios(tokens, values))
        assert seen.keys() == routers.keys(), f"routers of the actor {list(seen)}, of the rollout {list(routers)}"
        if routers:
            theirs, mine = (
                torch.stack([logits_of[name][: len(tokens) - 1].topk(top_k, -1).indices for name in routers], 1)
                for logits_of in (routers, seen)
            )
            # [T - 1, layers]
            missed.append((theirs[..., :, None] != mine[..., None, :]).all(-1).sum(-1))
            # the last token was sampled and not computed; layers without experts have no choices
            recorded = torch.zeros(len(tokens), model.config.num_hidden_layers, top_k, dtype=torch.int64)
            recorded[:-1, list(replay.layers)] = theirs
            with replay.replaying(recorded.to(device)):
                replayed.append(log_ratios(tokens, values))
    r = torch.cat(ratios)
    out = {"k3": (r.exp() - 1 - r).mean().item(), "tokens": len(r), "mean_abs_difference": r.abs().mean().item()}
    if missed:
        number = torch.cat(missed)
        out |= {
            "choices_differ": (number > 0).double().mean().item(),
            "tokens_differ": (number > 0).any(1).double().mean().item(),
            "experts_differ": number.double().mean().item() / top_k,
            "layers": number.shape[1],
        }
        r = torch.cat(replayed)
        out["k3_replayed"] = (r.exp() - 1 - r).mean().item()
    return out


def run_part(args: argparse.Namespace) -> None:
    """Runs one half of the measurement of one model, in a process of its own."""
    import torch

    file = Path(args.work) / "sampled.pt"
    quantized = args.base == "nvfp4"
    if args.part == "rollout":
        torch.save(sample(Path(args.model), quantized, args), file)
    else:
        found = torch.load(file)
        print("RESULT " + json.dumps(compare(Path(args.model), quantized, found, args)), flush=True)


def prepare(args: argparse.Namespace) -> list[tuple[str, str, Path]]:
    """Returns kind, base and folder of each model to measure; random models are written first."""
    if args.model:
        from qerl_verl.nvfp4.format import read_quantization

        folder = Path(args.model)
        return [("given", "nvfp4" if read_quantization(folder) == "nvfp4" else "bf16", folder)]
    from shapes import write_bf16, write_nvfp4

    out = []
    for kind, shape in (SHAPES_OF_DRY_RUN if args.dry_run else SHAPES_OF_RUN).items():
        packed, plain = (Path(args.work) / f"{shape}-{base}" for base in ("nvfp4", "decoded"))
        if not (packed / "model.safetensors.index.json").exists():
            write_nvfp4(packed, shape)
        if "bf16" in args.bases and not (plain / "model.safetensors.index.json").exists():
            write_bf16(plain, packed, shape)
        out += [(kind, base, {"nvfp4": packed, "bf16": plain}[base]) for base in args.bases]
    return out


def measure(base: str, folder: Path, args: argparse.Namespace) -> dict:
    """Measures one model: engine, then actor."""
    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_PLUGINS": "qerl",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function is sent to the worker
    }
    environment.pop(JOB_ENV, None)
    if base == "nvfp4":
        environment |= Job().environment()
    seconds = {}
    for part in ("rollout", "actor"):
        begin = time.monotonic()
        command = [sys.executable, __file__, "--part", part, "--base", base, "--model", str(folder)]
        for name in ("work", "samples", "prompt", "generated", "dtype", "kernel"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        seconds[part] = round(time.monotonic() - begin, 1)
        print(f"{folder.name}: the {part} took {seconds[part]:.0f} s", flush=True)
        lines = done.stdout.splitlines()
        print("\n".join(line for line in lines if "[qerl]" in line), flush=True)
        if done.returncode:
            print("\n".join(lines[-20:]), flush=True)
            raise RuntimeError(f"the {part} failed with {done.returncode}")
    found = json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))
    return found | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint, in NVFP4 or 16 bits, in place of the random models")
    parser.add_argument("--bases", nargs="*", default=["nvfp4", "bf16"], choices=["nvfp4", "bf16"])
    parser.add_argument("--samples", type=int, default=16, help="sequences")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--generated", type=int, default=128, help="tokens")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kernel", default="auto", help="qerl.rollout.kernel")
    parser.add_argument("--work", default="/tmp/qerl-bench", help="where the random models are written")
    parser.add_argument("--dry-run", action="store_true", help="tiny models and few tokens")
    parser.add_argument("--json", type=Path)
    for hidden in ("--part", "--base"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return
    if args.dry_run:
        args.samples, args.prompt, args.generated = 3, 16, 16
    Path(args.work).mkdir(parents=True, exist_ok=True)
    out = {
        "command": "python benchmarks/bench_routing.py " + " ".join(sys.argv[1:]),
        "gpu": (gpu_names() or ["none"])[0],
        "versions": {p: version(p) for p in ("vllm", "torch", "verl", "transformers")},
        "dtype": args.dtype,
        "runs": [],
    }
    models = {f"{kind} {base}": (kind, base, folder) for kind, base, folder in prepare(args)}
    with ResultFile(args.json, out) as result:
        for name in result.steps(models):
            kind, base, folder = models[name]
            try:
                run = {"kind": kind, "base": base, "model": folder.name, **measure(base, folder, args)}
            except RuntimeError as error:
                result.fail(name, str(error))
                continue
            result.content["runs"].append(run)
            values = "  ".join(f"{key} {run[key]:.3g}" for key in run if isinstance(run[key], float))
            print(f"{name}: {values}", flush=True)
            k3 = {(run["kind"], run["base"]): run["k3"] for run in result.content["runs"]}
            if {("mixture", "nvfp4"), ("dense", "nvfp4")} <= k3.keys():
                result.content["k3_mixture_to_dense"] = k3["mixture", "nvfp4"] / k3["dense", "nvfp4"]
    if ratio := result.content.get("k3_mixture_to_dense"):
        print(f"k3 of the mixture, in the dense model's: {ratio:.2f}", flush=True)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
