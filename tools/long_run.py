"""Runs the tiny setup for long. Measures whether memory or the number of handles grows, and what is
left behind when a run ends.

    python -m tools.long_run [--steps 300] [--out FOLDER]

Every ten steps: resident memory, open file handles and segments of shared memory of each process of
the job, as a table of the first, the middle and the last of them and a slope. Then three short
runs, one that ends, one that is interrupted with Ctrl-C and one whose trainer is killed, and what
each leaves in the folders for shared memory and temporary files."""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import psutil

from tests.integration.tiny_job import Job, make_inputs, title, traces

EVERY = 10
ORIGINS = (
    (r"/verl_weights_", "verl's weight transfer (shared memory)"),
    (r"/rl-colocate-zmq-", "verl's weight transfer (socket)"),
    (r"/ckpt_[0-9a-f]+\.lock$", "verl's lock of a checkpoint folder"),
    (r"/qerl", "QeRL"),
    (r"/psm_", "Python's SharedMemory: vLLM's message queue"),
    (r"/(sem|mp|pymp)[.-]", "Python's multiprocessing"),
    (r"/vllm_dist_", "vLLM"),
    (r"/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", "vLLM's sockets"),
    (r"/ray|/plasma", "Ray"),
)


def overrides(inputs: list[str], folder: Path, steps: int) -> list[str]:
    return [
        *inputs,
        f"trainer.total_training_steps={steps}",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "trainer.save_freq=50",
        "trainer.max_actor_ckpt_to_keep=2",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
    ]


def measure(job: Job) -> dict[str, dict[str, int]]:
    """Returns resident bytes, handles and mapped shared memory segments by the name of the process;
    those of the same name are added."""
    out: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for process in job.processes().values():
        try:
            name = short(title(process))
            segments = {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
            counts = {"rss": process.memory_info().rss, "handles": process.num_fds(), "segments": len(segments)}
        except psutil.Error:
            continue
        out[name].update(counts, processes=1)
    return {name: dict(counts) for name, counts in out.items()}


def short(text: str) -> str:
    words = text.split()
    for word in words:
        if "::" in word:
            return word.partition(".")[0]
    names = ("main_ppo", "gcs_server", "raylet", "log_monitor", "monitor.py", "dashboard", "resource_tracker")
    return next((n for n in names if n in text), Path(words[0]).name if words else "?")


def table(records: list[tuple[int, dict]], settled: int = 30) -> str:
    """Rows by process: at the first measurement after ``settled`` steps, in the middle, at the end,
    growth per 100 steps."""
    records = [r for r in records if r[0] >= settled] or records
    (first, a), (_, b), (last, c) = records[0], records[len(records) // 2], records[-1]
    lines = [f"| process | MiB at step {first} | middle | step {last} | MiB per 100 steps | handles | segments |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in sorted(c, key=lambda n: -c[n]["rss"]):
        if name not in a or name not in b:
            lines.append(
                f"| {name} | - | - | {c[name]['rss'] >> 20} | new | {c[name]['handles']} | {c[name]['segments']} |"
            )
            continue
        mib = [x[name]["rss"] / 2**20 for x in (a, b, c)]
        handles, segments = (" -> ".join(str(x[name][k]) for x in (a, b, c)) for k in ("handles", "segments"))
        second = next((s, r[name]["rss"] / 2**20) for s, r in records[len(records) // 2 :] if name in r)
        slope = (mib[2] - second[1]) / max(1, last - second[0]) * 100
        lines.append(
            f"| {name} | {mib[0]:.0f} | {mib[1]:.0f} | {mib[2]:.0f} | {slope:+.1f} (second half) | {handles} | {segments} |"
        )
    return "\n".join(lines)


def follow(job: Job, steps: int, out: Path) -> list[tuple[int, dict]]:
    """Measures until the job ends, and writes a line of JSON for each measurement to ``out``."""
    records: list[tuple[int, dict]] = []
    with out.open("w") as file:
        while job.wait(0.5) is None:
            step = max(job.metrics(), default=0)
            if step // EVERY > (records[-1][0] // EVERY if records else 0):
                records.append((step, measure(job)))
                file.write(json.dumps(records[-1]) + "\n")
                file.flush()
                print(f"step {step}: {sum(c['rss'] for c in records[-1][1].values()) >> 20} MiB", flush=True)
    assert job.process.returncode == 0 and max(job.metrics()) == steps, job.tail()
    return records


def by_origin(paths: set[Path]) -> str:
    found = collections.Counter(next((o for p, o in ORIGINS if re.search(p, str(x))), str(x)) for x in paths)
    return ", ".join(f"{n} of {origin}" for origin, n in sorted(found.items())) or "nothing"


def left_behind(how: str, folder: Path, inputs: list[str]) -> set[Path]:
    """Returns what a run of five steps leaves: ``end``, ``interrupt`` (Ctrl-C after step 2) or
    ``crash`` (its trainer is killed)."""
    before = traces()
    job = Job(folder, [*overrides(inputs, folder, 5), "trainer.save_freq=1"]).start()
    try:
        if how != "end":
            job.wait_until(lambda: 2 in job.metrics(), 300, "step 2")
        if how == "interrupt":
            os.killpg(job.process.pid, signal.SIGINT)
        elif how == "crash":
            job.kill("trainer")
        code = job.wait(300)
    finally:
        outlived = job.end()
    print(f"{how}: code {code}, outlived the driver: {outlived or 'nothing'}", flush=True)
    return {p for p in traces() - before if p != folder}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="0: only the short runs")
    parser.add_argument("--ends", nargs="*", default=["end", "interrupt", "crash"], help="the short runs")
    parser.add_argument("--out", type=Path, help="kept; a temporary folder otherwise")
    arguments = parser.parse_args()
    out = arguments.out.resolve() if arguments.out else Path(tempfile.mkdtemp(prefix="long_run_"))
    out.mkdir(parents=True, exist_ok=True)
    from conftest import make_model

    inputs = make_inputs(out, make_model(out / "model"))
    if arguments.steps:
        before = traces()
        job = Job(out / "long", overrides(inputs, out / "long", arguments.steps)).start()
        try:
            records = follow(job, arguments.steps, out / "measurements.jsonl")
        finally:
            job.end()
        print(table(records), flush=True)
        print(f"left behind: {by_origin(traces() - before)}", flush=True)
    for how in arguments.ends:
        print(f"left behind: {by_origin(left_behind(how, out / how, inputs))}", flush=True)
    if not arguments.out:
        shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
