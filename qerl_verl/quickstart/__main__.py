"""Runs a whole QeRL training without a GPU, from nothing to a table and a plot:
``python -m qerl_verl.quickstart``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path

from qerl_verl.data.prompts import write_parquet
from qerl_verl.ownership import Owner
from qerl_verl.platform.signals import ends_on_signals
from qerl_verl.quickstart.arithmetic import rows, split
from qerl_verl.quickstart.report import ENTROPY, REWARD, SIGMA, Run, plot, summarize, table

MILESTONES = (
    ("[qerl] platform:", "configuration", "configuration checked"),
    ("[qerl] model:", "quantization", "model quantized to NVFP4; starting Ray"),
    ("Started a local Ray", "Ray", "Ray is up; starting verl's trainer"),
    ("kernel: actor", "actor", "actor: NVFP4 base and LoRA adapters are built; starting vLLM"),
    ("[qerl] AQN sigma", "rollout", "rollout: vLLM runs the NVFP4 base; first validation"),
    ("Initial validation", "first validation", "training"),
)
"""Text in verl's log, the phase that ends when it appears, and the message to the user then."""


MARKER = ".qerl_quickstart"
"""File in a quickstart's folder. It names the process that makes the folder
(:mod:`qerl_verl.ownership`), and is empty when that process has finished."""

MADE = ("data", "model", "cache", "hydra", "checkpoints", "train.log", "metrics.jsonl", "summary.json", "curves.png")
"""Files that a quickstart creates in its folder, and that the next one there replaces."""


class NotOurs(Exception):
    """The folder has other content, or belongs to a quickstart that may still run. Nothing was
    changed."""


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Claims the folder ``out`` for this process within the block.

    The folder must be absent, empty, or that of a finished quickstart, whose files are removed.

    Raises:
        NotOurs: gives the reason.
    """
    marker = out / MARKER
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not marker.is_file():
            raise NotOurs(f"{out} is not empty and no quickstart made it (it has no {MARKER}): choose another --out")
        owner = Owner.read(marker)
        if owner and owner.state() != "dead":
            runs = "runs in it" if owner.state() == "alive" else "may still run in it"
            raise NotOurs(f"the quickstart of {owner} {runs} ({marker}): choose another --out than {out}")
    for path in (out / name for name in MADE):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    Owner.current().write(marker)
    try:
        yield
    finally:
        with suppress(OSError):  # on a full disk, the end of the process frees the folder as well
            marker.write_text("")


class _Clock:
    """Measures seconds by phase, and prints a line for each."""

    def __init__(self):
        self.start = self.mark = time.monotonic()
        self.seconds: dict[str, float] = {}

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self.mark
        self.mark = now

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)


def make_inputs(out: Path, seed: int, clock: _Clock) -> None:
    """Writes model, training and validation data under ``out``."""
    clock.say("making a tiny Qwen2 model and giving it a short supervised start on arithmetic (under a minute)")
    from transformers.utils import logging

    from qerl_verl.quickstart.tiny_model import make_tiny_model

    logging.disable_progress_bar()
    train, validation = split(seed)
    write_parquet(rows(train), out / "data" / "train.parquet")
    write_parquet(rows(validation), out / "data" / "validation.parquet")
    make_tiny_model(out / "model", train, seed=seed, report=clock.say)
    clock.phase("model")


def run_verl(out: Path, overrides: list[str], clock: _Clock) -> int:
    """Runs ``python -m verl.trainer.main_ppo`` with the recipe, with its log in ``train.log``.

    Returns:
        The exit code.
    """
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    command += ["--config-path", str(files("qerl_verl.recipes")), "--config-name", "quickstart_cpu"]
    command += [f"quickstart.out={out}", *overrides]
    clock.say("$ " + " ".join(command))
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"), "HYDRA_FULL_ERROR": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1"}
    with open(out / "train.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _follow(process, out, clock)
        except BaseException:
            _kill(process)
            raise
    return process.returncode


def _follow(process: subprocess.Popen, out: Path, clock: _Clock) -> None:
    """Prints milestones and steps as they appear in the log, until the process ends."""
    waiting, shown = list(MILESTONES), 0
    heartbeat = time.monotonic()
    while True:
        ended = process.poll() is not None
        if waiting:
            log = (out / "train.log").read_text(errors="replace")
            for milestone in [m for m in waiting if m[0] in log]:
                _, phase, text = milestone
                clock.phase(phase)
                clock.say(text)
                del waiting[: waiting.index(milestone) + 1]
                heartbeat = time.monotonic()
        run = Run.read(out / "metrics.jsonl")
        for step in run.training[shown:]:
            m = run.steps[step]
            clock.say(
                f"step {step}: reward {m[REWARD]:.3f}, entropy {m[ENTROPY]:.3f}, sigma "
                f"{m.get(SIGMA, 0.0):.2g}, {m['timing_s/step']:.1f} s"
            )
            shown += 1
            heartbeat = time.monotonic()
        if ended:
            return
        if time.monotonic() - heartbeat > 30:
            clock.say("...")
            heartbeat = time.monotonic()
        time.sleep(1)


def _kill(process: subprocess.Popen) -> None:
    """Ends the driver, and with it Ray and every worker."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        os.killpg(process.pid, sign)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qerl_verl.quickstart", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the run; an ended quickstart's is replaced"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. trainer.total_training_steps=10")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    try:
        with claimed(out), ends_on_signals():
            return quickstart(out, arguments.seed, arguments.overrides)
    except NotOurs as error:
        parser.error(str(error))


def quickstart(out: Path, seed: int, overrides: list[str]) -> int:
    """Runs everything from the inputs to the table in the claimed folder. Returns the exit code."""
    clock = _Clock()
    make_inputs(out, seed, clock)
    try:
        code = run_verl(out, overrides, clock)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the log is {out / 'train.log'}", file=sys.stderr)
        return 130
    clock.phase("steps, last validation and end")
    log = (out / "train.log").read_text(errors="replace")
    run = Run.read(out / "metrics.jsonl")
    if code != 0 or not run.training:
        print("\n".join(log.splitlines()[-40:]), file=sys.stderr)
        for error in re.findall(r"^.*?\b\w+(?:Error|Exception)\b: .*$", log, re.MULTILINE)[-1:]:
            print(f"\n{error}", file=sys.stderr)
        print(f"\nthe run ended with code {code}; the whole log is {out / 'train.log'}", file=sys.stderr)
        return code or 1
    samples = _samples_per_step(out)
    summary = summarize(run, samples, clock.seconds, log)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(run, out / "curves.png")
    print(f"\n{table(summary)}\n\n  {out / 'curves.png'}\n  {out / 'summary.json'}\n  {out / 'train.log'}")
    return 0


def _samples_per_step(out: Path) -> int:
    """Returns prompts times samples of a step, from the configuration that ran."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(out / "hydra" / ".hydra" / "config.yaml")
    return config.data.train_batch_size * config.actor_rollout_ref.rollout.n


if __name__ == "__main__":
    sys.exit(main())
