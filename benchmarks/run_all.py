"""Runs all benchmarks of one GPU, part by part (`make bench`).

    python benchmarks/run_all.py --list                  # the parts, their limits, what is there already
    python benchmarks/run_all.py --results somewhere     # within an hour
    python benchmarks/run_all.py --parts gemm rollout_7b --force
    python benchmarks/run_all.py --within 9              # as much as 9 minutes allow

A part writes ``RESULTS/<part>_<gpu>.json`` and records in it, under ``made``, the code, the GPU and
the versions of the measurement. A call skips parts with a result for the same three, so it
continues after an interruption. A part that exceeds its limit is ended, and the others follow. Its
rows stay in ``RESULTS/<part>_<gpu>.incomplete.json``, and the next call measures the missing ones.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from result_file import ROOT, describe_machine, gpu_names, have_same_conditions, read_result

from qerl_verl.json_files import write_json_atomically

GRACE_SECONDS = 10
INCOMPLETE = ".incomplete.json"


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        name: stem of its file, and its name in ``--parts``.
        script: file in this folder.
        arguments: arguments without ``--json``.
        minutes: limit. The limits of all parts add up to an hour.
        gpus: number of GPUs that it needs.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    minutes: float
    gpus: int = 1


OTHER_TOKENS = ("--tokens", "1", "16", "33", "64", "100", "128", "200", "256", "1000", "8192")
PARTS = (
    Part("gemm", "bench_gemm.py", ("--marlin",), 2.5),
    Part("lora_gemm", "bench_gemm.py", ("--lora",), 2.5),
    Part("grpo_step_7b", "bench_grpo_step.py", ("--bypass",), 12),
    Part("rollout_7b", "bench_rollout.py", ("--shape", "7B"), 5),
    Part("training_7b", "bench_training.py", (), 3),
    Part(
        "training_7b_12288",
        "bench_training.py",
        (
            *("--batch", "16", "--length", "768", "--no-gradients", "--profile"),
            *("--variants", "bf16_peft", "nvfp4_selective_compiled", "nvfp4_auto"),
        ),
        2.5,
    ),
    Part("gemm_other_shapes", "bench_gemm.py", ("--tune", "--shapes", "others", *OTHER_TOKENS), 3),
    Part("lora_gemm_other_shapes", "bench_gemm.py", ("--tune", "--lora", "--shapes", "others", *OTHER_TOKENS), 3),
    Part("without_flash_attn", "bench_without_flash_attn.py", (), 1),
    Part("rollout_32b", "bench_rollout.py", ("--shape", "32B-32", "--sequences", "8", "64", "256"), 4.5),
    Part("experts", "bench_experts.py", (), 1.5),
    Part("experts_training", "bench_experts_training.py", (), 1),
    Part("moe_30b", "bench_moe.py", ("--layers", "8", "--sequences", "1", "8", "64", "256"), 3.5),
    Part("triton_gemm", "bench_triton_gemm.py", (), 2),
    Part(
        "noise_7b",
        "bench_noise.py",
        ("--shape", "7B", "--rounds", "1", "--repeats", "3", "--generated", "128", "--kinds", "graphs"),
        4,
    ),
    Part("routing_30b", "bench_routing.py", ("--samples", "8", "--bases", "nvfp4"), 3.5),
    Part("shared_base", "bench_shared_base.py", ("--shape", "7B-2", "--seconds", "175"), 3),
    Part("quantizer_speed_7b", "bench_quantizer_speed.py", ("--shape", "7B", "--layers", "8"), 2.5),
)
"""The parts in the order in which they run; the numbers that users ask for first come early."""

EXTRA = (Part("two_gpus_7b", "bench_two_gpus.py", (), 20, gpus=2),)
"""Parts beyond the hour, which run where the machine has the GPUs."""


BY_NAME = (
    Part("grpo_step_7b_long", "bench_grpo_step.py", ("--long",), 16),
    Part("grpo_step_32b", "bench_grpo_step.py", ("--shape", "32B", "--variants", "nvfp4_lora"), 10),
    Part(
        "training_32b",
        "bench_training.py",
        (
            "--shape",
            "32B",
            "--batch",
            "10",
            "--length",
            "768",
            "--profile",
            "--no-gradients",
            "--variants",
            "nvfp4_auto",
        ),
        4,
    ),
)
"""Parts that run only when ``--parts`` names them."""


def short_name(gpu: str) -> str:
    """Returns ``h100`` for ``NVIDIA H100 80GB HBM3``; for others the whole name, fit for a file."""
    match = re.search(r"\b([A-Z]{1,2}\d{1,4}[A-Z]?)\b", gpu)
    return (match.group(1) if match else re.sub(r"\W+", "_", gpu)).lower()


def result_file(part: Part, results: Path, gpu: str) -> Path:
    """Returns the file of the part's complete result."""
    return results / f"{part.name}_{short_name(gpu)}.json"


def incomplete_file(path: Path) -> Path:
    """Returns the file in which a part collects its rows, beside that of its complete result."""
    return path.with_name(path.stem + INCOMPLETE)


def is_current(path: Path, machine: dict) -> bool:
    """Returns whether the result in ``path`` is from this code, GPU and these versions."""
    return have_same_conditions(read_result(path).get("made"), machine)


def describe_plan(parts: Sequence[Part], results: Path, machine: dict, force: bool) -> str:
    """Returns one line for each part: whether it runs, its limit, and its last duration."""
    lines, total = [], 0.0
    for part in parts:
        path = result_file(part, results, machine["gpu"])
        seconds = (read_result(path).get("made") or {}).get("seconds")
        took = f"took {seconds / 60:.1f} min last time" if seconds else "not timed yet"
        if is_current(path, machine) and not force:
            lines.append(f"  {part.name:<24} is there: {path}")
            continue
        total += part.minutes
        rows = incomplete_file(path)
        if is_current(rows, machine) and not force:
            took = f"goes on, {read_result(rows).get('incomplete')}"
        lines.append(f"  {part.name:<24} at most {part.minutes:g} min, {took}")
    return "\n".join([f"{machine['gpu']}, code {machine['code']}:", *lines, f"at most {total:g} min in all"])


def run_part(part: Part, path: Path, machine: dict, minutes: float, python: str = sys.executable) -> str | None:
    """Runs one part and puts its complete result into place.

    Args:
        part: the benchmark.
        path: file of its complete result. Without one its rows stay in :func:`incomplete_file`.
        machine: see :func:`result_file.describe_machine`.
        minutes: after which the part is ended.
        python: interpreter.

    Returns:
        What is missing or wrong, or None.
    """
    rows = incomplete_file(path)
    if not is_current(rows, machine):
        rows.unlink(missing_ok=True)
    script = str(Path(__file__).parent / part.script)
    command = [python, script, *part.arguments, "--json", str(rows)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for helpers in tests/
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True)
    try:
        problem = f"exit code {code}" if (code := process.wait(minutes * 60)) else None
    except subprocess.TimeoutExpired:
        problem = f"took longer than {minutes:g} min and was ended"
    finally:
        _end(process)
    if not is_current(rows, machine):
        return f"no result ({problem or 'exit code 0'})"
    found = read_result(rows)
    for node in (found, found.get("environment")):
        if isinstance(node, dict) and "command" in node:  # removes the temporary name
            node["command"] = " ".join(["python", f"benchmarks/{part.script}", *part.arguments, "--json", path.name])
    write_json_atomically(rows, found)
    if "incomplete" in found:
        return f"incomplete, {found['incomplete']} ({problem or 'exit code 0'}); its rows are in {rows}"
    rows.replace(path)
    return problem


def _end(process: subprocess.Popen) -> None:
    """Ends the part and every process that it started, including engines."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.2)  # gives its children time to end


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing parts. Returns 1 where one gave no complete result, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {part.name: part for part in (*PARTS, *EXTRA, *BY_NAME)}
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--parts", nargs="+", choices=known, metavar="PART", help=f"of {', '.join(known)}")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--within", type=float, metavar="MINUTES", help="end all parts after this time; the next call goes on"
    )
    parser.add_argument("--list", action="store_true", help="show the plan and run nothing")
    arguments = parser.parse_args(argv)
    gpus = gpu_names()
    if not gpus:
        parser.error("no NVIDIA GPU: nvidia-smi names none")
    parts = [known[name] for name in arguments.parts] if arguments.parts else [*PARTS, *EXTRA]
    for part in [part for part in parts if part.gpus > len(gpus)]:
        print(
            f"{part.name} is left out: it needs {part.gpus} GPUs, and there is {len(gpus)}",
            flush=True,
        )
        parts.remove(part)
    machine = describe_machine(gpus[0])
    print(describe_plan(parts, arguments.results, machine, arguments.force), flush=True)
    if arguments.list:
        return 0
    arguments.results.mkdir(parents=True, exist_ok=True)
    problems = {}
    end = time.monotonic() + 60 * (arguments.within or float("inf"))
    for number, part in enumerate(parts, 1):
        path = result_file(part, arguments.results, machine["gpu"])
        if arguments.force:
            incomplete_file(path).unlink(missing_ok=True)
        elif is_current(path, machine):
            continue
        minutes = min(part.minutes, round((end - time.monotonic()) / 60, 2))
        if minutes <= 0:
            problems[part.name] = f"not started: the {arguments.within:g} min of --within are over"
            continue
        print(f"\n[{number} of {len(parts)}] {part.name}, at most {minutes:g} min", flush=True)
        if problem := run_part(part, path, machine, minutes):
            problems[part.name] = problem
            print(f"{part.name}: {problem}", flush=True)
        else:
            print(f"{part.name}: {path}, {read_result(path)['made']['seconds']:.0f} s", flush=True)
    for name, problem in problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
