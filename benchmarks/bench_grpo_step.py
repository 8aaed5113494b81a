"""Measures one GRPO step of `python -m verl.trainer.main_ppo`: NVFP4 + LoRA against stock bf16 +
LoRA.

    python benchmarks/bench_grpo_step.py --shape 7B --json benchmarks/results/grpo_step_7b_h200.json

Both runs train the same random model (the bf16 checkpoint is the NVFP4 one, decoded) on the same
prompts: 16 prompts of 256 tokens, 8 samples each, 512 generated tokens without early end, LoRA rank
32 on all linears, SDPA attention, one GPU. verl computes log-probabilities with flash-attn's Triton
cross entropy where it can be imported. Otherwise it computes them row by row, which takes longer
than the model in either run; the result says which. The first step warms up and is left out. The
numbers are means over the other steps, from verl's own metrics. To use several GPUs of a host, run
the ``--variants`` one by one with the same ``--work``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from result_file import ResultFile, gpu_names

HERE = Path(__file__).resolve().parent
PROMPT, RESPONSE, PROMPTS, SAMPLES = 256, 512, 16, 8
SWITCH = ["+qerl=nvfp4"]
STOCK = [
    "actor_rollout_ref.model.lora_rank=32", "actor_rollout_ref.model.lora_alpha=32",
    "actor_rollout_ref.model.target_modules=all-linear", "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.load_format=safetensors", "actor_rollout_ref.actor.strategy=fsdp2",
]  # fmt: skip
VARIANTS = {
    "bf16_lora": ("bf16", STOCK),
    "nvfp4_lora": ("nvfp4", SWITCH),
    "nvfp4_lora_not_compiled": ("nvfp4", [*SWITCH, "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False"]),
    "nvfp4_lora_full_recompute": ("nvfp4", [*SWITCH, "qerl.recompute=full"]),
    "nvfp4_lora_no_noise": ("nvfp4", [*SWITCH, "qerl.aqn.enable=False"]),
    "nvfp4_lora_sleep2": ("nvfp4", [*SWITCH, "qerl.rollout.sleep_level=2"]),
    "nvfp4_punica": ("nvfp4", [*SWITCH, "qerl.rollout.lora=punica"]),
    "nvfp4_marlin_punica": ("nvfp4", [*SWITCH, "qerl.rollout.lora=punica", "qerl.rollout.kernel=marlin"]),
}
KEPT = re.compile(
    r"^(timing_s/(step|gen|old_log_prob|update_actor|update_weights|reward|adv)|perf/(throughput|max_memory_allocated_gb|"
    r"max_memory_reserved_gb|cpu_memory_used_gb)|actor/(loss|grad_norm|entropy|pg_loss)|training/rollout_probs_diff_(mean|max)|"
    r"actor/perf/max_memory_(allocated|reserved)_gb|rollout_corr/(k3_kl|kl)|qerl/aqn_sigma|response_length/mean)$"
)


def prepare(work: Path, shape: str) -> None:
    """Writes models, tokenizer and prompts to disk."""
    sys.path.insert(0, str(HERE))
    import torch
    from shapes import SHAPES, write_bf16, write_nvfp4

    from qerl_verl.quickstart.tiny_model import build_tokenizer

    if (work / "prompts.parquet").exists():
        return
    import pandas

    nvfp4 = write_nvfp4(work / "nvfp4", shape)
    write_bf16(work / "bf16", nvfp4, shape)
    tokenizer = build_tokenizer()
    fill = SHAPES[shape]["vocab_size"] - len(tokenizer)
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(fill)])
    for name in ("nvfp4", "bf16"):
        tokenizer.save_pretrained(work / name)
    empty = len(
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(PROMPTS * 8):
        text = "".join(chr(97 + i) for i in torch.randint(0, 26, (PROMPT - empty,), generator=generator).tolist())
        rows.append({
            "data_source": "random", "prompt": [{"role": "user", "content": text}], "ability": "none",
            "reward_model": {"style": "rule", "ground_truth": str(index)}, "extra_info": {"index": index},
        })  # fmt: skip
    pandas.DataFrame(rows).to_parquet(work / "prompts.parquet")
    (work / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return float(sum(map(ord, solution_str[:16])) % 7) / 7\n"
    )


def command(name: str, work: Path, steps: int, extra: list[str]) -> list[str]:
    base, own = VARIANTS[name]
    return [
        sys.executable, "-m", "verl.trainer.main_ppo", *own, "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={work / base}", "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"data.train_files={work / 'prompts.parquet'}",
        f"data.val_files={work / 'prompts.parquet'}", f"data.train_batch_size={PROMPTS}",
        f"data.max_prompt_length={PROMPT}", f"data.max_response_length={RESPONSE}",
        f"actor_rollout_ref.rollout.n={SAMPLES}", "actor_rollout_ref.rollout.ignore_eos=True",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1", "actor_rollout_ref.rollout.gpu_memory_utilization=0.5",
        "actor_rollout_ref.rollout.cudagraph_capture_sizes=[1,2,4,8,16,32,64,128]",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.actor.optim.lr=1e-5", "actor_rollout_ref.actor.use_kl_loss=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True", "actor_rollout_ref.model.use_remove_padding=False",
        "trainer.logger=[console]", "trainer.n_gpus_per_node=1", "trainer.nnodes=1", f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=False", "trainer.test_freq=-1", "trainer.save_freq=-1", "trainer.resume_mode=disable",
        f"reward.custom_reward_function.path={work / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score", "data.dataloader_num_workers=0",
        f"trainer.default_local_dir={work / 'checkpoints'}", *extra,
    ]  # fmt: skip


def metrics_of(log: str) -> dict[int, dict[str, float]]:
    """Returns the metrics of KEPT that verl's console logger printed, by step."""
    steps: dict[int, dict[str, float]] = {}
    for line in log.splitlines():
        found = re.search(r"step:(\d+) - (.*)", line)
        if not found:
            continue
        values = {}
        for item in found[2].split(" - "):
            key, _, value = item.partition(":")
            if KEPT.match(key):
                number = re.search(r"[-+0-9.eEnaif]+", value.replace("np.float64(", ""))
                values[key] = float(number[0])
        steps[int(found[1])] = values
    return steps


def run(line: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
    """Runs a command and returns its exit code and output.

    ``log`` receives the lines as they appear, each with the seconds since the start.
    """
    begin, printed = time.perf_counter(), []
    with (
        subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as process,
        open(log or os.devnull, "w", buffering=1) as file,
    ):
        for text in process.stdout:
            printed.append(text)
            file.write(f"{time.perf_counter() - begin:8.2f} {text}")
    return process.returncode, "".join(printed)


def has_cross_entropy() -> bool:
    """Returns whether verl finds flash-attn's kernel (verl/utils/torch_functional.py)."""
    try:
        return importlib.util.find_spec("flash_attn.ops.triton.cross_entropy") is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--variants", nargs="*", default=["bf16_lora", "nvfp4_lora"], choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/qerl-bench-grpo"))
    parser.add_argument("--logs", type=Path, help="folder for the logs of the runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", help="more settings of verl, for all runs")
    args = parser.parse_args()
    work = args.work / args.shape
    work.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        prepare(work, args.shape)
        return
    environment = {"VERL_LOGGING_LEVEL": "WARNING", **os.environ}
    subprocess.run([sys.executable, __file__, "--prepare", "--shape", args.shape, "--work", str(args.work)], check=True)

    out = {
        "command": "python benchmarks/bench_grpo_step.py " + " ".join(sys.argv[1:]),
        "shape": args.shape,
        "gpu": (gpu_names() or ["none"])[0],
        "versions": {p: version(p) for p in ("verl", "vllm", "torch", "transformers", "peft")},
        "flash_attn_cross_entropy": has_cross_entropy(),
        "runs": {},
    }
    with ResultFile(args.json, out) as result:
        for name in result.steps(args.variants):
            line = command(name, work, args.steps, args.extra)
            code, printed = run(line, environment, args.logs and args.logs / f"{name}.log")
            steps = metrics_of(printed)
            said = {
                x.split("[qerl]")[1] for x in printed.splitlines() if "[qerl] kernel" in x or "[qerl] recompute" in x
            }
            for text in sorted(said):
                print("[qerl]" + text, flush=True)
            measured = [values for step, values in steps.items() if step > 1]
            if code or not measured:
                print(printed[-3000:], flush=True)
                result.fail(name, f"ended with exit code {code} after {len(steps)} steps")
                continue
            keys = set.intersection(*(set(v) for v in measured))
            mean = {k: sum(v[k] for v in measured) / len(measured) for k in sorted(keys)}
            result.content["runs"][name] = {"command": " ".join(line[1:]), "mean": mean, "steps": steps}
            add_ratios(result.content)
            print(name, json.dumps({k: round(v, 5) for k, v in mean.items()}), flush=True)
    for name, ratios in result.content.get("ratio_to_bf16_lora", {}).items():
        print(name, "  ".join(f"{k.removeprefix('timing_s/')} {v:.2f}x" for k, v in ratios.items()), flush=True)
    sys.exit(result.exit_code)


def add_ratios(out: dict) -> None:
    """Adds the speed of each run against stock verl's, by phase, if that was measured."""
    if base := out["runs"].get("bf16_lora"):
        timings = [k for k in base["mean"] if k.startswith("timing_s/")]
        out["ratio_to_bf16_lora"] = {
            name: {k: base["mean"][k] / run["mean"][k] for k in timings if run["mean"].get(k)}
            for name, run in out["runs"].items()
        }


if __name__ == "__main__":
    main()
