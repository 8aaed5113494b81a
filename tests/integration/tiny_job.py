"""One run of main_ppo on the tiny model: its inputs, its processes, what it leaves behind. For
tests that kill it.

The run can be repeated bit for bit (``repeatable.py``): each request has a seed, the engine
computes one sequence at a time, and a batch comes to the trainer in a fixed order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VICTIMS = {
    "driver": "verl.trainer.main_ppo",
    "trainer": "ray::TaskRunner",
    "actor": "ray::WorkerDict",
    "server": "ray::QeRLHttpServer",
    "engine core": "VLLM::EngineCore",
    "engine worker": "VLLM::Worker",
    "agent loop": "ray::AgentLoopWorkerTQ",
    "reward worker": "ray::RewardLoopWorker",
    "queue": "ray::TransferQueueController",
    "storage": "ray::SimpleStorageUnit",
}
"""What of a job can be killed: text in the title of its process. ``driver`` is the process that the
user starts."""


OUTLIVE_SECONDS = 30.0
"""What the processes of a job may take to end after the driver."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of the two agents that each of Ray's nodes starts. They hold some 100 MB each."""

AGENTS_OUTLIVE_SECONDS = 60.0 + OUTLIVE_SECONDS
"""What :data:`AGENTS` may take. A driver that is killed takes Ray's control store and raylet with
it at once. An agent notices within two seconds, then reports the end of its raylet to the control
store and waits up to 60 seconds for that to answer (ray/_private/process_watcher.py,
``report_raylet_error_logs``; ray/_private/utils.py, ``publish_error_to_driver``)."""


def make_inputs(folder: Path, model: Path) -> list[str]:
    """Makes training and validation data under ``folder``. Returns the overrides of a run on them,
    without steps and folders."""
    from qerl_verl.data.prompts import write_parquet
    from qerl_verl.quickstart.arithmetic import rows, split

    training, held_out = split(seed=0, held_out=16)
    write_parquet(rows(training[:64]), folder / "train.parquet")
    write_parquet(rows(held_out), folder / "validation.parquet")
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    return [
        "+qerl=nvfp4",
        "qerl.aqn.sigma_start=0.05",
        "qerl.aqn.sigma_end=0.005",
        f"qerl.cache_dir={folder / 'cache'}",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder / 'train.parquet'}",
        f"data.val_files={folder / 'validation.parquet'}",
        "data.train_batch_size=8",
        "data.max_prompt_length=32",
        "data.max_response_length=8",
        f"actor_rollout_ref.model.path={model}",
        "actor_rollout_ref.model.lora_rank=8",
        f"{rollout}.n=4",
        f"{rollout}.max_model_len=64",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=32",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=16",
        f"{actor}.optim.lr=2e-3",
        f"reward.custom_reward_function.path={HERE / 'digit_reward.py'}",
        "trainer.logger=[file]",
        "trainer.total_epochs=1000",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
    ]


REPEATABLE = [
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
    f"actor_rollout_ref.rollout.agent.agent_loop_config_path={HERE / 'repeatable_agent.yaml'}",
    "actor_rollout_ref.rollout.agent.default_agent_loop=repeatable",
    "trainer.v1.sampler.custom_sampler.path=pkg://tests.integration.repeatable",
    "trainer.v1.sampler.custom_sampler.name=RepeatableReplayBuffer",
    "actor_rollout_ref.model.external_lib=tests.integration.repeatable",
]


@dataclass
class Job:
    """A running main_ppo.

    Args:
        folder: working directory and log, and ``metrics.jsonl``, which each start replaces.
        overrides: Hydra's.
        hold_folder: where :meth:`hold` leaves its files; None for a job that is never held.
    """

    folder: Path
    overrides: list[str]
    hold_folder: Path | None = None
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def start(self) -> Job:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "VERL_FILE_LOGGER_PATH": str(self.folder / "metrics.jsonl"),
            "HYDRA_FULL_ERROR": "1",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
        }
        if self.hold_folder:
            self.hold_folder.mkdir(exist_ok=True)
            for file in self.hold_folder.iterdir():
                file.unlink()
            environment["QERL_TEST_HOLD"] = str(self.hold_folder)
        self.log = self.folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "verl.trainer.main_ppo", *self.overrides],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def processes(self) -> dict[int, psutil.Process]:
        """Returns every process of the job that was ever seen and is alive. Ray's outlive their
        parents, so look often."""
        try:
            main = psutil.Process(self.process.pid)
            self.seen.update({p.pid: p for p in (main, *main.children(recursive=True))})
        except psutil.NoSuchProcess:
            pass
        return {pid: p for pid, p in self.seen.items() if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE}

    def find(self, victim: str) -> list[psutil.Process]:
        return [p for p in self.processes().values() if VICTIMS[victim] in title(p)]

    def hold(self, phase: str, step: int) -> None:
        """Lets the job stop at a phase of a step; :meth:`held` tells when it has."""
        (self.hold_folder / "reached").unlink(missing_ok=True)
        (self.hold_folder / "want").write_text(f"{phase} {step}")

    def held(self) -> bool:
        return (self.hold_folder / "reached").exists()

    def release(self) -> None:
        (self.hold_folder / "want").unlink(missing_ok=True)

    def wait_until(self, condition, seconds: float, what: str) -> None:
        """Raises: AssertionError with the end of the log if the job ends before, or the time is
        over."""
        end = time.monotonic() + seconds
        while not condition():
            self.processes()
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.tail()}"
            assert time.monotonic() < end, f"no {what} within {seconds} s:\n{self.tail()}"
            time.sleep(0.05)

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, None if it still runs."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.processes()
            time.sleep(0.1)
        return self.process.poll()

    def kill(self, victim: str) -> list[int]:
        """Sends SIGKILL; ``job`` means everything at once. Returns the process ids."""
        victims = list(self.processes().values()) if victim == "job" else self.find(victim)
        assert victims, f"no process of the job is its {victim}: {[title(p) for p in self.processes().values()]}"
        for process in victims:
            _signal(process, signal.SIGKILL)
        return [p.pid for p in victims]

    def end(self) -> list[str]:
        """Kills what is left. Returns the titles of what had outlived the driver by
        :data:`OUTLIVE_SECONDS`, or by :data:`AGENTS_OUTLIVE_SECONDS` where it is an agent of
        Ray's."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        ended = time.monotonic()
        while (left := list(self.processes().values())) and time.monotonic() < ended + AGENTS_OUTLIVE_SECONDS:
            agents_alone = all(title(p).startswith(AGENTS) for p in left)
            if not agents_alone and time.monotonic() > ended + OUTLIVE_SECONDS:
                break
            time.sleep(0.1)
        titles = [title(p) for p in left]
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=10)
        return titles

    def metrics(self) -> dict[int, dict]:
        """Returns the metrics of the last start, by step."""
        path, out = self.folder / "metrics.jsonl", {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # a line that a kill cut off
                continue
            out.setdefault(entry["step"], {}).update(entry["data"])
        return out

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-characters:]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _status(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.Error:
        return psutil.STATUS_ZOMBIE


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass


COMPARED = (
    *("actor/lr", "actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/kl_loss"),
    *("critic/score/mean", "prompt_length/mean", "response_length/mean", "training/rollout_probs_diff_mean"),
    *("qerl/aqn_sigma", "qerl/aqn_stage"),
)


def metric_differences(unbroken: dict, resumed: dict) -> list[str]:
    """Metrics of one step that are not equal."""
    names = [n for n in COMPARED if n in unbroken]
    return [f"{n}: {unbroken[n]!r} != {resumed.get(n)!r}" for n in names if unbroken[n] != resumed.get(n)]


def checkpoint_differences(unbroken: Path, resumed: Path) -> list[str]:
    """Compares adapter, optimizer, scheduler and data position of two checkpoints; returns what is
    not equal bit for bit."""
    out = []
    for name in ("model", "optim", "extra_state"):
        file = f"actor/{name}_world_size_1_rank_0.pt"
        a, b = (torch.load(folder / file, weights_only=False) for folder in (unbroken, resumed))
        if name == "extra_state":
            a, b = a["lr_scheduler"], b["lr_scheduler"]
        out += [f"{name}: {place}" for place in _unequal(a, b)]
    a, b = (torch.load(folder / "data.pt", weights_only=False) for folder in (unbroken, resumed))
    return out + [f"data.pt: {place}" for place in _unequal(a, b)]


def _unequal(a, b, place: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in _unequal(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in _unequal(x, y, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = (t.to_local() if hasattr(t, "to_local") else t for t in (a, b))
        if a.shape == b.shape and torch.equal(a, b):
            return []
        far = (a.float() - b.float()).abs().max().item() if a.shape == b.shape else "shapes"
        return [f"{place} (difference {far})"]
    return [] if a == b else [f"{place}: {a!r} != {b!r}"]


def traces() -> set[Path]:
    """Entries of the folders for shared memory and temporary files."""
    return {
        p for folder in {Path("/dev/shm"), Path(tempfile.gettempdir())} if folder.is_dir() for p in folder.iterdir()
    }
