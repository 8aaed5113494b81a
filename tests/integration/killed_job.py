"""Kills a process of a run at a phase of a step, resumes, and compares with a run that nobody
killed.

One folder of checkpoints goes through all cases. The run is killed, the same command is started
again and takes three more steps, which have to be those of the unbroken run bit for bit (adapter,
optimizer, scheduler, data position, noise, metrics). Then the next process is killed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.tiny_model import make_model
from tests.integration.tiny_job import (
    REPEATABLE,
    Job,
    checkpoint_differences,
    make_inputs,
    metric_differences,
)

STEPS = 400  # the horizon of the noise schedule; no run goes that far
END_SECONDS = 60.0  # how long a job may go on after one of its processes was killed
START_SECONDS = 1200.0


def overrides(inputs: Sequence[str], checkpoints: Path) -> list[str]:
    return [
        *inputs,
        *REPEATABLE,
        f"trainer.total_training_steps={STEPS}",
        f"qerl.aqn.num_stages={STEPS // 2}",
        "trainer.save_freq=1",
        "trainer.resume_mode=auto",
        f"trainer.default_local_dir={checkpoints}",
    ]


def saved_step(checkpoints: Path) -> int:
    from qerl_verl.trainer.checkpoints import checkpoint_step, find_resumable

    folder = find_resumable(checkpoints, lambda text: None)
    return 0 if folder is None else checkpoint_step(folder)


def make_unbroken(folder: Path, inputs: list[str], steps: int) -> Job:
    """Returns a run of at least ``steps`` steps that was then killed, or one that exists
    already."""
    job = Job(folder, overrides(inputs, folder / "checkpoints"))
    if max(job.metrics(), default=0) > steps:
        return job
    job.start()
    try:
        job.wait_until(lambda: steps + 1 in job.metrics(), START_SECONDS + 20 * steps, f"step {steps + 1}")
    finally:
        job.kill("job")
        job.end()
    return job


def kill_at(job: Job, victim: str, phase: str, step: int) -> dict:
    """Kills ``victim`` when the run is in a phase of a step. Returns what happened then."""
    job.hold(phase, step)
    job.wait_until(job.held, START_SECONDS, f"{phase} of step {step}")
    checkpoint = job.folder / "checkpoints" / f"global_step_{step}"
    files = len([p for p in checkpoint.rglob("*") if p.is_file()]) if checkpoint.exists() else 0
    job.kill(victim)
    killed = time.monotonic()
    time.sleep(0.5)
    job.release()
    code = job.wait(END_SECONDS)
    ended = time.monotonic() - killed
    message = next((line.strip() for line in reversed(job.tail(20000).splitlines()) if "Error" in line), "")
    named = re.findall(r"\[qerl\] the run has lost a process: (\w+)", job.log.read_text(errors="replace"))
    return {
        "files": files,
        "code": code,
        "named": sorted(set(named)),
        "ended": f"{ended:.0f} s, code {code}" if code is not None else f"not within {END_SECONDS:.0f} s",
        "outlived": [t.split()[0] for t in job.end()],
        "message": message,
    }


def resume_and_compare(job: Job, unbroken: Job, start: int, steps: int = 3) -> list[str]:
    """Starts again, takes ``steps`` steps, and returns what differs from the unbroken run. The job
    is still running."""
    job.start()
    last = start + steps
    whole = job.folder / "checkpoints" / f"global_step_{last}" / "qerl_checkpoint.json"
    job.wait_until(lambda: last in job.metrics() and whole.exists(), START_SECONDS, f"step {last}")
    theirs, ours = unbroken.metrics(), job.metrics()
    differences = []
    for step in range(start + 1, last + 1):
        differences += [f"step {step}, {text}" for text in metric_differences(theirs[step], ours[step])]
        folders = (j.folder / "checkpoints" / f"global_step_{step}" for j in (unbroken, job))
        differences += [f"step {step}, {text}" for text in checkpoint_differences(*folders)]
    return differences


def run(cases: list[tuple[str, str]], out: Path, report, more: Sequence[str] = ()) -> list[dict]:
    """Runs all cases, one after the other.

    Args:
        report: called with each row as soon as it is complete.
        more: overrides of both runs, after those of the job.
    """
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    inputs = [*make_inputs(out, make_model(out / "model")), *more]
    unbroken = make_unbroken(out / "unbroken", inputs, steps=4 + 5 * len(cases))
    job = Job(out / "killed", overrides(inputs, out / "killed" / "checkpoints"), hold_folder=out / "hold").start()
    rows = []
    step = 2
    for victim, phase in cases:
        row = {"victim": victim, "phase": phase, "step": step} | kill_at(job, victim, phase, step)
        start = saved_step(job.folder / "checkpoints")
        row["lost"] = step - start
        row["differences"] = resume_and_compare(job, unbroken, start)
        step = max(job.metrics()) + 2
        rows.append(row)
        report(row)
    job.kill("job")
    job.end()
    return rows
