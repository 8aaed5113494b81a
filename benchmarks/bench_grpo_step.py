"""Measures one GRPO step of `python -m verl.trainer.main_ppo`: NVFP4 + LoRA against stock bf16 +
LoRA.

    python benchmarks/bench_grpo_step.py --json benchmarks/results/grpo_step_7b_h200.json
    python benchmarks/bench_grpo_step.py --bypass --json FILE          # and verl's bypass mode
    python benchmarks/bench_grpo_step.py --long --json FILE            # responses of 3840 tokens
    python benchmarks/bench_grpo_step.py --shape 32B --variants nvfp4_lora --json FILE

All runs of a call train the same random model (the bf16 checkpoint is the NVFP4 one, decoded) on
the same prompts, with LoRA rank 32 on all linears and without early end, on one GPU:

- ``7B``: 16 prompts of 256 tokens, 8 samples each, 512 generated tokens, 16 sequences a pass;
- ``--long``: 16 prompts, 4 samples each, 3840 generated tokens, 2 sequences a pass;
- ``32B``: as 7B, with the micro-batches and the memory of the recipe ``gsm8k_grpo_32b``.

Attention is SDPA without packing in both runs of 7B, and what the switch chooses for 32B. verl
computes log-probabilities with flash-attn's Triton cross entropy where it can be imported.
Otherwise stock verl computes them row by row, which takes longer than the model; the result says
which. With ``--bypass``, more steps of the same run follow, in which
``algorithm.rollout_correction.bypass_mode`` acts; they are the run ``..._bypass``.

The first step warms up and is left out. The numbers are means over the other steps, from verl's own
metrics. ``start`` of a run has the seconds from the command to the first line of each process, to
the messages about loading, compiling and capturing, and to the first step's metrics. The file has
each step when it ends, so that a run that is cut off leaves its steps (``cut_off``).

Expected times of one variant on an H100, start and model included (not measured): 7B five minutes
(NVFP4) and six (bf16), one more with ``--bypass``, ``--long`` eight minutes, 32B nine minutes.
``--budget SECONDS`` starts no further variant after this time; the same command then goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from result_file import ResultFile, gpu_names

HERE = Path(__file__).resolve().parent
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
    "nvfp4_lora_compile_cache": ("nvfp4", [*SWITCH, "qerl.rollout.compile_cache=True"]),
    "nvfp4_punica": ("nvfp4", [*SWITCH, "qerl.rollout.lora=punica"]),
    "nvfp4_marlin_punica": ("nvfp4", [*SWITCH, "qerl.rollout.lora=punica", "qerl.rollout.kernel=marlin"]),
}
BASELINES = ("bf16_lora", "bf16_lora_bypass")


@dataclass(frozen=True)
class Case:
    """The sizes of a step.

    Attributes:
        prompts: number of prompts.
        samples: of each prompt.
        prompt: tokens of a prompt.
        response: tokens of a response.
        steps: by default, with the first one, which warms up.
        settings: of verl.
    """

    prompts: int
    samples: int
    prompt: int
    response: int
    steps: int
    settings: tuple[str, ...]


def _sequences_a_pass(number: int) -> tuple[str, ...]:
    return (
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={number}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={number}",
    )


SDPA = (
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=False",
)
HALF = "actor_rollout_ref.rollout.gpu_memory_utilization=0.5"
SHORT = Case(16, 8, 256, 512, 3, (*SDPA, *_sequences_a_pass(16), HALF))
LONG = Case(16, 4, 256, 3840, 2, (*SDPA, *_sequences_a_pass(2), HALF))
ON_ONE_CARD = Case(
    16, 8, 256, 512, 2,
    (
        "actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.6", "actor_rollout_ref.rollout.max_num_seqs=128",
    ),
)  # fmt: skip
"""A model that fits on the card in four bits alone, as recipes/gsm8k_grpo_32b.yaml trains it."""

BYPASSED = "_bypass"
"""Behind the name of a variant, the name of its steps in bypass mode."""

KEPT = re.compile(
    r"^(timing_s/(step|gen|old_log_prob|update_actor|update_weights|reward|adv)|perf/(throughput|max_memory_allocated_gb|"
    r"max_memory_reserved_gb|cpu_memory_used_gb)|actor/(loss|grad_norm|entropy|pg_loss)|training/rollout_probs_diff_(mean|max)|"
    r"actor/perf/max_memory_(allocated|reserved)_gb|rollout_corr/(k3_kl|kl)|qerl/aqn_sigma|response_length/mean)$"
)


def case_of(shape: str, long: bool) -> Case:
    """Returns the sizes for a shape of the model."""
    return LONG if long else ON_ONE_CARD if shape.startswith("32B") else SHORT


def prepare(work: Path, shape: str, case: Case, bases: set[str]) -> None:
    """Writes the models of ``bases``, the tokenizer and the prompts to disk, where they are not
    there."""
    import torch
    from shapes import SHAPES, write_bf16, write_nvfp4

    nvfp4, bf16 = work / "nvfp4", work / "bf16"
    if not (nvfp4 / "tokenizer.json").exists():
        write_nvfp4(nvfp4, shape)
        save_tokenizer(nvfp4, SHAPES[shape]["vocab_size"])
    if "bf16" in bases and not (bf16 / "tokenizer.json").exists():
        write_bf16(bf16, nvfp4, shape)
        save_tokenizer(bf16, SHAPES[shape]["vocab_size"])
    import pandas

    tokenizer = save_tokenizer(None, SHAPES[shape]["vocab_size"])
    empty = len(
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(case.prompts * 8):
        letters = torch.randint(0, 26, (case.prompt - empty,), generator=generator).tolist()
        rows.append({
            "data_source": "random", "prompt": [{"role": "user", "content": "".join(chr(97 + i) for i in letters)}],
            "ability": "none", "reward_model": {"style": "rule", "ground_truth": str(index)}, "extra_info": {"index": index},
        })  # fmt: skip
    pandas.DataFrame(rows).to_parquet(work / "prompts.parquet")
    (work / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return float(sum(map(ord, solution_str[:16])) % 7) / 7\n"
    )


def save_tokenizer(folder: Path | None, size: int):
    """Writes a byte-level tokenizer with ``size`` tokens, and returns it without the unused ones.

    The unused tokens are part of the vocabulary. As added tokens, 150,000 of them would take each
    process that loads the tokenizer 12 s.
    """
    from qerl_verl.quickstart.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    if folder:
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] |= {f"unused{i}": i for i in range(len(tokenizer), size)}
        file.write_text(json.dumps(content))
    return tokenizer


def command(name: str, work: Path, case: Case, steps: int, extra: list[str]) -> list[str]:
    base, own = VARIANTS[name]
    return [
        sys.executable, "-m", "verl.trainer.main_ppo", *own, "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={work / base}", f"data.train_files={work / 'prompts.parquet'}",
        f"data.val_files={work / 'prompts.parquet'}", f"data.train_batch_size={case.prompts}",
        f"data.max_prompt_length={case.prompt}", f"data.max_response_length={case.response}",
        f"actor_rollout_ref.rollout.n={case.samples}", "actor_rollout_ref.rollout.ignore_eos=True",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.cudagraph_capture_sizes=[1,2,4,8,16,32,64,128]",
        "actor_rollout_ref.rollout.calculate_log_probs=True", *case.settings,
        f"actor_rollout_ref.actor.ppo_mini_batch_size={case.prompts}",
        "actor_rollout_ref.actor.optim.lr=1e-5", "actor_rollout_ref.actor.use_kl_loss=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
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


PROCESS = re.compile(r"\(([A-Za-z_][\w.]*)(?:\(\d+\))? pid=\d+")
"""Ray's and vLLM's mark of the process that printed a line."""
MESSAGE = re.compile(
    r"\[qerl\] (?:kernel|compil|launches|recompute)|[Mm]odel loading took|[Ll]oading weights took|torch\.compile t|"
    r"Dynamo bytecode transform|[Gg]raph captur\w+ (?:finished|took)|init engine|Available KV cache|Initial profiling"
)
"""Messages of the start that have a time or say what has ended."""


class Start:
    """Where the time from the command to the first step goes, from the lines that a run prints."""

    def __init__(self) -> None:
        self.processes: dict[str, float] = {}
        self.messages: list[tuple[float, str]] = []
        self.first_step: float | None = None

    def see(self, seconds: float, line: str) -> None:
        """Takes a line and its time in seconds since the command."""
        if self.first_step is not None:
            return
        if found := PROCESS.search(line):
            self.processes.setdefault(found[1], round(seconds, 1))
        if MESSAGE.search(line) and len(self.messages) < 60:
            self.messages.append((round(seconds, 1), re.sub(r"\x1b\[\d*m", "", line).strip()[:240]))
        if "step:1 - " in line:
            self.first_step = round(seconds, 1)

    def describe(self) -> dict:
        """Returns what a result file holds of it; times in seconds since the command."""
        return {
            "first_line_of_process": self.processes,
            "messages": self.messages,
            "first_step_ended": self.first_step,
        }


def run(
    line: list[str],
    environment: dict[str, str],
    log: Path | None,
    see: Callable[[float, str], None] = lambda seconds, text: None,
) -> tuple[int, str]:
    """Runs a command and returns its exit code and output.

    Args:
        line: the command.
        environment: of its process.
        log: receives the lines as they appear, each with the seconds since the start.
        see: called with the seconds since the start and each line.
    """
    begin, printed = time.perf_counter(), []
    with (
        subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
        open(log or os.devnull, "w", buffering=1) as file,
    ):
        try:
            for text in process.stdout:
                seconds = time.perf_counter() - begin
                printed.append(text)
                file.write(f"{seconds:8.2f} {text}")
                see(seconds, text)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            raise
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
    parser.add_argument("--long", action="store_true", help="64 sequences of 4096 tokens")
    parser.add_argument("--bypass", action="store_true", help="as many more steps in verl's bypass mode")
    parser.add_argument("--variants", nargs="*", default=["bf16_lora", "nvfp4_lora"], choices=VARIANTS)
    parser.add_argument("--steps", type=int, help="with the first one, which warms up")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further variant is started")
    parser.add_argument("--work", type=Path, default=Path("/tmp/qerl-bench-grpo"))
    parser.add_argument("--logs", type=Path, help="folder for the logs of the runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    parser.add_argument("extra", nargs="*", help="more settings of verl, for all runs")
    args = parser.parse_args()
    work, case = args.work / args.shape, case_of(args.shape, args.long)
    steps, extra = args.steps or case.steps, args.extra
    bypass_from = steps + 1 if args.bypass else None
    if args.bypass:
        sampler = "trainer.v1.sampler"
        extra = [
            *(
                f"{sampler}.custom_sampler.path={HERE / 'bypass_steps.py'}",
                f"{sampler}.custom_sampler.name=BypassSteps",
            ),
            *(f"+{sampler}.sampler_kwargs.bypass_from={bypass_from}", *extra),
        ]
        steps += steps - 1
    if args.print:
        for name in args.variants:
            print(" ".join(command(name, work, case, steps, extra)))
        return
    work.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        prepare(work, args.shape, case, {VARIANTS[name][0] for name in args.variants})
        return
    begin = time.monotonic()
    # verl would set WARN, and vLLM says at INFO how long loading, compiling and capturing took
    environment = {"VERL_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_LEVEL": "INFO", **os.environ}
    out = {
        "command": "python benchmarks/bench_grpo_step.py " + " ".join(sys.argv[1:]),
        "shape": args.shape,
        "sizes": {key: getattr(case, key) for key in ("prompts", "samples", "prompt", "response")},
        "gpu": (gpu_names() or ["none"])[0],
        "versions": {p: version(p) for p in ("verl", "vllm", "torch", "transformers", "peft")},
        "flash_attn_cross_entropy": has_cross_entropy(),
        "runs": {},
        "cut_off": {},
    }
    with ResultFile(args.json, out) as result:
        for name in result.steps(args.variants):
            if time.monotonic() - begin > args.budget:
                result.fail(name, f"not started: {args.budget:.0f} s are over")
                continue
            own = [sys.executable, __file__, "--prepare", "--shape", args.shape, "--work", str(args.work)]
            subprocess.run([*own, *(["--long"] if args.long else []), "--variants", name], check=True)
            line = command(name, work, case, steps, extra)
            measure(name, line, environment, args.logs and args.logs / f"{name}.log", result, bypass_from)
    for key, value in result.content.items():
        if key.startswith("ratio_to_"):
            for name, ratios in value.items():
                shown = "  ".join(f"{k.removeprefix('timing_s/')} {v:.2f}x" for k, v in ratios.items())
                print(f"{name} against {key.removeprefix('ratio_to_')}: {shown}", flush=True)
    sys.exit(result.exit_code)


def measure(
    name: str,
    line: list[str],
    environment: dict[str, str],
    log: Path | None,
    result: ResultFile,
    bypass_from: int | None = None,
) -> None:
    """Runs a variant, and adds the means of its steps and its start to the result.

    Args:
        name: of the variant.
        line: its command.
        environment: of its process.
        log: receives its output.
        result: the file.
        bypass_from: first step in bypass mode, which are a run of their own in the file.
    """
    start, begin = Start(), time.monotonic()

    def see(seconds: float, text: str) -> None:
        start.see(seconds, text)
        if "[qerl] " in text:
            print(text.rstrip(), flush=True)
        if re.search(r"step:\d+ - ", text):
            cut_off = result.content["cut_off"].setdefault(name, {"steps": {}})
            cut_off["steps"] |= {str(step): values for step, values in metrics_of(text).items()}
            cut_off["start"] = start.describe()
            result.save()
            print(f"{name}, {seconds:.0f} s after the command: step {list(cut_off['steps'])[-1]}", flush=True)

    code, printed = run(line, environment, log, see)
    steps = metrics_of(printed)
    last = max(steps, default=0)
    ranges = {name: range(2, bypass_from or last + 1)}
    if bypass_from:
        ranges[name + BYPASSED] = range(bypass_from, last + 1)
    measured = {run_name: [steps[step] for step in numbers] for run_name, numbers in ranges.items()}
    if code or not all(measured.values()):
        print(printed[-3000:], flush=True)
        result.fail(name, f"ended with exit code {code} after {len(steps)} steps")
        return
    for run_name, rows in measured.items():
        keys = set.intersection(*(set(row) for row in rows))
        mean = {k: sum(row[k] for row in rows) / len(rows) for k in sorted(keys)}
        result.content["runs"][run_name] = {
            "command": " ".join(line[1:]),
            "mean": mean,
            "steps": {str(step): steps[step] for step in ((1,) if run_name == name else ()) + tuple(ranges[run_name])},
        }
        print(run_name, json.dumps({k: round(v, 5) for k, v in mean.items()}), flush=True)
    result.content["runs"][name] |= {"start": start.describe(), "seconds": round(time.monotonic() - begin, 1)}
    result.content["cut_off"].pop(name, None)
    add_ratios(result.content)


def add_ratios(out: dict) -> None:
    """Adds the speed of each run against stock verl's, by phase, for each baseline that was
    measured."""
    for baseline in BASELINES:
        if base := out["runs"].get(baseline):
            timings = [k for k in base["mean"] if k.startswith("timing_s/")]
            out[f"ratio_to_{baseline}"] = {
                name: {k: base["mean"][k] / run["mean"][k] for k in timings if run["mean"].get(k)}
                for name, run in out["runs"].items()
            }


if __name__ == "__main__":
    main()
