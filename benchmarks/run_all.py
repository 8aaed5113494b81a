"""Runs all benchmarks of one GPU, part by part (`make bench`).

    python benchmarks/run_all.py --list                  # the parts, their limits, what is there already
    python benchmarks/run_all.py --results somewhere     # within an hour
    python benchmarks/run_all.py --parts gemm rollout_7b --force

A part writes ``RESULTS/<part>_<gpu>.json`` and records in it, under ``made``, the code, the GPU and
the versions of the measurement. A call skips parts with a result for the same three, so it
continues after an interruption. A part that exceeds its limit is ended, and the others follow.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED_CODE = ("kernels", "qerl_verl", "benchmarks")
"""Folders whose Python and CUDA files decide what a benchmark measures."""
PACKAGES = ("torch", "triton", "vllm", "verl", "transformers", "peft", "flash-attn")
GRACE_SECONDS = 10


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


PARTS = (
    Part("gemm", "bench_gemm.py", ("--marlin",), 4),
    Part("lora_gemm", "bench_gemm.py", ("--lora",), 4),
    Part("grpo_step_7b", "bench_grpo_step.py", ("--variants", "bf16_lora", "nvfp4_lora"), 15),
    Part("rollout_7b", "bench_rollout.py", ("--shape", "7B"), 8),
    Part("training_7b", "bench_training.py", (), 4),
    Part(
        "training_7b_12288",
        "bench_training.py",
        (
            "--batch",
            "16",
            "--length",
            "768",
            "--variants",
            "bf16_peft",
            "nvfp4_selective",
            "nvfp4_selective_compiled",
        ),
        5,
    ),
    Part("gemm_other_shapes", "bench_gemm.py", ("--tune", "--shapes", "others"), 5),
    Part("lora_gemm_other_shapes", "bench_gemm.py", ("--tune", "--lora", "--shapes", "others"), 5),
    Part("without_flash_attn", "bench_without_flash_attn.py", (), 2),
    Part("rollout_32b", "bench_rollout.py", ("--shape", "32B-32", "--sequences", "8", "64", "256"), 8),
)
"""The parts in the order in which they run; the numbers that users ask for first come early."""

EXTRA = (Part("two_gpus_7b", "bench_two_gpus.py", (), 20, gpus=2),)
"""Parts beyond the hour, which run where the machine has the GPUs."""


def gpu_names() -> list[str]:
    """Returns the names of the GPUs of this machine; empty without a driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def short_name(gpu: str) -> str:
    """Returns ``h100`` for ``NVIDIA H100 80GB HBM3``; for others the whole name, fit for a file."""
    match = re.search(r"\b([A-Z]{1,2}\d{1,4}[A-Z]?)\b", gpu)
    return (match.group(1) if match else re.sub(r"\W+", "_", gpu)).lower()


def hash_code(root: Path = ROOT) -> str:
    """Returns the hash of the files that decide what is measured.

    A commit that changes other files does not repeat a benchmark, and an uncommitted change does.
    """
    digest = hashlib.sha256()
    for folder in MEASURED_CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".yaml") and path.name not in (
                "report.py",
                "run_all.py",
            ):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def describe_machine(gpu: str) -> dict:
    """Returns the conditions of a result: code, GPU and versions. The commit is only
    information."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"code": hash_code(), "gpu": gpu, "versions": versions, "commit": commit}


def result_file(part: Part, results: Path, gpu: str) -> Path:
    """Returns the file that the part writes."""
    return results / f"{part.name}_{short_name(gpu)}.json"


def read_made(path: Path) -> dict | None:
    """Returns the conditions of the result in ``path``, or None where it does not have them."""
    try:
        made = json.loads(path.read_text()).get("made")
    except (OSError, ValueError, AttributeError):
        return None
    return made if isinstance(made, dict) else None


def is_current(path: Path, machine: dict) -> bool:
    """Returns whether the result in ``path`` is from this code, GPU and these versions."""
    made = read_made(path) or {}
    return all(made.get(key) == machine[key] for key in ("code", "gpu", "versions"))


def describe_plan(parts: Sequence[Part], results: Path, machine: dict, force: bool) -> str:
    """Returns one line for each part: whether it runs, its limit, and its last duration."""
    lines, total = [], 0.0
    for part in parts:
        path = result_file(part, results, machine["gpu"])
        made = read_made(path)
        took = f"took {made['seconds'] / 60:.1f} min last time" if made and made.get("seconds") else "not timed yet"
        if is_current(path, machine) and not force:
            lines.append(f"  {part.name:<24} is there: {path}")
        else:
            total += part.minutes
            lines.append(f"  {part.name:<24} at most {part.minutes:g} min, {took}")
    return "\n".join([f"{machine['gpu']}, code {machine['code']}:", *lines, f"at most {total:g} min in all"])


def run_part(part: Part, path: Path, machine: dict, python: str = sys.executable) -> str | None:
    """Runs one part and puts its result into place.

    Returns:
        The reason why there is no result, or None.
    """
    staging = path.with_name(f".{path.name}.part")
    staging.unlink(missing_ok=True)
    command = [
        python,
        str(Path(__file__).parent / part.script),
        *part.arguments,
        "--json",
        str(staging),
    ]
    started = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(part.minutes * 60)
    except subprocess.TimeoutExpired:
        return f"took longer than {part.minutes:g} min and was ended"
    finally:
        _end(process)
    try:
        found = json.loads(staging.read_text())
    except (OSError, ValueError):
        return f"wrote no result (exit code {code})"
    if code:
        return f"ended with exit code {code}; what it measured is in {staging}"
    for node in (found, found.get("environment")):
        if isinstance(node, dict) and "command" in node:  # removes the temporary name
            node["command"] = " ".join(["python", f"benchmarks/{part.script}", *part.arguments, "--json", path.name])
    found["made"] = machine | {"seconds": round(time.monotonic() - started, 1)}
    staging.write_text(json.dumps(found, indent=1) + "\n")
    staging.replace(path)
    return None


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
    """Runs the missing parts. Returns 1 where a part gave no result, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {part.name: part for part in (*PARTS, *EXTRA)}
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--parts", nargs="+", choices=known, metavar="PART", help=f"of {', '.join(known)}")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
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
    failures = {}
    for number, part in enumerate(parts, 1):
        path = result_file(part, arguments.results, machine["gpu"])
        if is_current(path, machine) and not arguments.force:
            continue
        print(f"\n[{number} of {len(parts)}] {part.name}, at most {part.minutes:g} min", flush=True)
        if problem := run_part(part, path, machine):
            failures[part.name] = problem
            print(f"{part.name}: {problem}", flush=True)
        else:
            print(f"{part.name}: {path}, {read_made(path)['seconds']:.0f} s", flush=True)
    for name, problem in failures.items():
        print(f"no result: {name} {problem}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
