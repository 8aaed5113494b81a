"""Runs arms and seeds of the study with ``verl.trainer.main_ppo``, several side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qerl_verl.json_files import write_json_atomically
from qerl_verl.platform.signals import ends_on_signals

HERE = Path(__file__).resolve().parent
SHARED = ("common",)
"""Files of this folder that are not arms."""

ARMS = tuple(sorted(file.stem for file in HERE.glob("*.yaml") if file.stem not in SHARED))
SCALES = tuple(sorted(file.stem for file in (HERE / "scale").glob("*.yaml")))
POLL_SECONDS = 2.0
END_SECONDS = 60.0
"""Seconds that a run may take to end after it is told to."""
HOST_GIB_PER_RUN = 10.5
"""Host memory of one run at SmolLM2's scale. Twelve runs reached 95 % of 125 GiB, where Ray
begins to kill."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The recipe's ``trainer.experiment_name``."""
        return f"{self.arm}_s{self.seed}"


def parse_arm(text: str) -> list[Run]:
    """Parses text like ``nvfp4:1-3,7`` into runs; without seeds, seed 1.

    Raises:
        SystemExit: an unknown arm, or seeds that are not numbers; the message lists the arms.
    """
    arm, _, seeds = text.partition(":")
    if arm not in ARMS:
        raise SystemExit(f"{arm}: no arm of the study; there are {', '.join(ARMS)}")
    found: list[int] = []
    for part in (seeds or "1").split(","):
        low, _, high = part.partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise SystemExit(f"{text}: seeds are numbers and ranges, e.g. {arm}:1-3,7")
        found += range(int(low), int(high or low) + 1)
    return [Run(arm, seed) for seed in found]


def metrics_file(out: Path, run: Run) -> Path:
    """Returns the file of the run's metrics, with one JSON object for each step."""
    return out / "runs" / run.name / "metrics.jsonl"


def finished_file(out: Path, run: Run) -> Path:
    """Returns the file that is written when the run has ended by itself."""
    return metrics_file(out, run).parent / "finished.json"


def is_finished(out: Path, run: Run) -> bool:
    """Returns whether the run has ended by itself."""
    return finished_file(out, run).exists()


def _check_finished(wanted: Sequence[Run], out: Path, scale: str, overrides: Sequence[str]) -> None:
    """Refuses to count a run as finished that had other settings than those that are wanted now."""

    def settings(words: Sequence[str]) -> list[str]:
        # the folder may have moved
        return [word for word in words[1:] if not word.startswith("study.out=")]

    problems = []
    for run in wanted:
        if is_finished(out, run):
            then = settings(json.loads(finished_file(out, run).read_text())["command"])
            now = settings(command(run, out, scale, overrides))
            if then != now:
                gone, new = ([w for w in a if w not in b] for a, b in ((then, now), (now, then)))
                problems.append(f"{run.name} has finished with {' '.join(gone) or 'fewer settings'}, not with "
                                f"{' '.join(new) or 'fewer settings'}")  # fmt: skip
    if problems:
        raise SystemExit(f"{'; '.join(problems)}. Call it as before, or give another folder with --out")


def command(run: Run, out: Path, scale: str, overrides: Sequence[str]) -> list[str]:
    """Returns the command that a person would type for this run."""
    return [
        sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", "pkg://qerl_verl.recipes",
        "--config-name", f"study/{run.arm}", f"study/scale={scale}", f"study.out={out}", f"study.seed={run.seed}", *overrides,
    ]  # fmt: skip


def run_all(
    wanted: Sequence[Run],
    out: Path,
    scale: str,
    gpus: Sequence[str],
    per_gpu: int,
    stagger: float,
    overrides: Sequence[str] = (),
) -> int:
    """Runs what has not finished, ``per_gpu`` side by side on each GPU, in the given order.

    Args:
        wanted: the runs.
        out: folder of the study.
        scale: a file of ``scale/``.
        gpus: names for ``CUDA_VISIBLE_DEVICES``; empty on a CPU.
        per_gpu: number of runs side by side on one GPU.
        stagger: seconds between two starts.
        overrides: ``key=value`` for all runs.

    Returns:
        0 if every run has finished, otherwise 1. The log of a run is ``runs/NAME/log.txt``.

    Raises:
        SystemExit: a finished run had other settings, or the host's memory is too small for so many
            runs; the message gives the largest number.
    """
    out = out.absolute()
    _check_finished(wanted, out, scale, overrides)
    waiting = [run for run in wanted if not is_finished(out, run)]
    devices: list[str | None] = [*gpus] or [None]
    slots = [gpu for _ in range(per_gpu) for gpu in devices]
    _check_host_memory(min(len(slots), len(waiting)), scale)
    running: dict[subprocess.Popen, tuple[Run, str | None, float]] = {}
    failed = []
    print(
        f"{len(wanted)} runs, {len(wanted) - len(waiting)} of them finished already; {len(slots)} side by side",
        flush=True,
    )
    try:
        with ends_on_signals():
            while waiting or running:
                while waiting and slots:
                    run, gpu = waiting.pop(0), slots.pop(0)
                    running[_start(run, gpu, out, scale, overrides)] = (run, gpu, time.monotonic())
                    print(f"{run.name}: started" + (f" on GPU {gpu}" if gpu else ""), flush=True)
                    time.sleep(stagger)
                for process in [p for p in running if p.poll() is not None]:
                    run, gpu, begin = running.pop(process)
                    slots.append(gpu)
                    seconds = time.monotonic() - begin
                    if process.returncode == 0:
                        record = {"command": command(run, out, scale, overrides), "seconds": seconds}
                        write_json_atomically(finished_file(out, run), record)
                        print(
                            f"{run.name}: finished in {seconds:.0f} s; {len(waiting)} wait, {len(running)} run",
                            flush=True,
                        )
                    else:
                        failed.append(run)
                        log = metrics_file(out, run).parent / "log.txt"
                        print(
                            f"{run.name}: ended with {process.returncode} after {seconds:.0f} s, see {log}", flush=True
                        )
                time.sleep(POLL_SECONDS)
    finally:
        _end(running)
    if failed:
        print(
            f"not finished: {', '.join(run.name for run in failed)}; the same command takes them up again", flush=True
        )
    return 1 if failed else 0


def most_side_by_side(available_gib: float, scale: str) -> int | None:
    """Returns how many runs fit into the host's memory; None where it is not known for the scale.

    Args:
        available_gib: free memory in GiB.
        scale: a file of ``scale/``.
    """
    return max(1, int(available_gib / HOST_GIB_PER_RUN)) if scale == "smollm2" else None


def _check_host_memory(side_by_side: int, scale: str) -> None:
    import psutil

    available = psutil.virtual_memory().available / 2**30
    most = most_side_by_side(available, scale)
    if most is not None and side_by_side > most:
        raise SystemExit(
            f"{side_by_side} runs side by side need about {side_by_side * HOST_GIB_PER_RUN:.0f} "
            f"GiB of host memory and {available:.0f} GiB are available, so Ray would kill some of "
            f"them; choose --per-gpu and --gpus for at most {most} runs side by side"
        )


def _end(running: Mapping[subprocess.Popen, tuple[Run, str | None, float]]) -> None:
    """Ends the remaining runs as SIGTERM ends a job with the switch, which leaves nothing
    behind."""
    for process, (run, _, _) in running.items():
        print(f"{run.name}: ended with this command", flush=True)
        process.terminate()
    for process in running:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _start(run: Run, gpu: str | None, out: Path, scale: str, overrides: Sequence[str]) -> subprocess.Popen:
    file = metrics_file(out, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(file)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(file.parent / "log.txt", "a") as log:
        return subprocess.Popen(
            command(run, out, scale, overrides),
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
