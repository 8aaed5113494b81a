"""Tests the benchmark of a run's memory on commands that are no training runs."""

import json
import os
import signal
import sys
import threading
import time

import bench_memory
import psutil
import pytest
import shapes
from bench_memory import GIB, Run

STEP = (
    "step:{0} - timing_s/step:{1} - timing_s/gen:1.5 - rollout_corr/k3_kl:np.float64(0.001) - response_length/mean:8.0"
)
COMMAND = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
print("(WorkerDict pid=1) [qerl] kernel: actor NVFP4 linear = Hopper", flush=True)
print("(Server pid=2) [qerl] base: the rollout uses 5.45 GiB of the actor's", flush=True)
block = bytearray(b"x" * (200 << 20))
time.sleep(1.5)
print("{first}", flush=True)
print("{second}", flush=True)
{end}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that executes a command under the meter."""
    monkeypatch.setattr(bench_memory, "HOST_SECONDS", 0.1)

    def execute(end: str, stop_after_s: float | None = None):
        stored = []

        def store(found: dict) -> None:
            stored.append(json.dumps(found))
            if stop_after_s is not None and "step 2" in found["at_s"] and len(stored) == 4:
                threading.Timer(stop_after_s, os.kill, (os.getpid(), signal.SIGUSR2)).start()

        text = COMMAND.format(first=STEP.format(1, 0.2), second=STEP.format(2, 0.1), end=end)
        made = Run([sys.executable, "-c", text], tmp_path / "log", None, store)
        good = made.execute(dict(os.environ))
        return good, json.loads(stored[-1]), len(stored), (tmp_path / "log").read_text()

    return execute


def child_of(log: str) -> int:
    return int(log.split("child ")[1].split()[0])


def test_a_run_is_measured_by_phase_and_leaves_no_process(run):
    good, found, stored, log = run("")
    assert good and found["exit_code"] == 0 and stored == 5  # four phases and the end
    assert list(found["at_s"]) == ["actor built", "rollout's model loaded", "step 1", "step 2"]
    assert found["steps"]["1"]["timing_s/gen"] == 1.5 and found["steps"]["2"]["rollout_corr/k3_kl"] == 0.001
    assert found["start_to_first_step_s"] == pytest.approx(found["at_s"]["step 1"] - 0.2, abs=0.11)
    assert 0.19 < found["peaks"]["whole run"]["pss_gib"] < 0.6
    assert len(found["said"]) == 2 and "last_lines" not in found
    assert not psutil.pid_exists(child_of(log))


def test_a_run_that_fails_leaves_its_last_lines(run):
    good, found, _, log = run("raise ValueError('no memory')")
    assert not good and found["exit_code"] == 1
    assert found["last_lines"][-1] == "ValueError: no memory"
    assert not psutil.pid_exists(child_of(log))


def test_a_run_that_is_stopped_leaves_its_stacks(run, tmp_path):
    stacks = tmp_path / "stacks"
    end = f'import os\nos.dup2(os.open("{stacks}", os.O_CREAT | os.O_WRONLY), 2)\n'
    end += "def stand_still():\n    time.sleep(600)\nstand_still()"
    before = signal.signal(signal.SIGUSR2, bench_memory.interrupted)
    try:
        begin = time.monotonic()
        good, found, _, log = run(end, stop_after_s=0.5)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not good and found["exit_code"] is None and found["stopped"] == "interrupted"
    assert any("in stand_still" in line for lines in found["stacks"].values() for line in lines)
    assert list(found["steps"]) == ["1", "2"] and time.monotonic() - begin < 30
    assert not psutil.pid_exists(child_of(log))


@pytest.mark.parametrize(("prints", "peak_gib"), [("seq 1000 1024 3048; sleep 60", 2.0), ("exit 1", None)])
def test_the_card_is_read_line_by_line(tmp_path, monkeypatch, prints, peak_gib):
    """The stand-in prints MiB and goes on, as nvidia-smi does."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{prints}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    meter = bench_memory.Meter("0", "none")
    meter.start()
    if peak_gib is None:
        with pytest.raises(SystemExit, match="prints no memory"):
            meter.wait_for_card()
        return
    meter.wait_for_card()
    end = time.monotonic() + 20
    while len(meter.card) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    meter.stop()
    assert meter.before_mib == 1000 and [used for _, used in meter.card] == [1000, 2024, 3048]
    assert meter.peaks()["whole run"]["card_gib"] == peak_gib


@pytest.mark.parametrize(
    ("arguments", "shared", "utilization", "peak"),
    [
        (["--shape", "7B", "--base", "shared", "--limit-gib", "24"], True, 0.08, 22.4),
        (["--shape", "7B", "--base", "separate", "--limit-gib", "24"], False, 0.148, 22.4),
        # the engine takes what the limit leaves, which is less than all sequences need
        (["--shape", "14B", "--base", "shared", "--limit-gib", "24"], True, 0.131, 26.2),
        (["--shape", "32B", "--base", "shared", "--limit-gib", "45"], True, 0.246, 43.8),
    ],
)
def test_the_share_of_the_rollout_is_what_its_sequences_need(tmp_path, arguments, shared, utilization, peak):
    args = bench_memory.parse(arguments)
    shapes.write_config(tmp_path / "nvfp4", args.shape, quantized=True)
    (tmp_path / "prompts.parquet").touch()
    found, predicted = bench_memory.predict(args, tmp_path, int(79.2 * GIB))
    assert (predicted["shared"], found) == (shared, pytest.approx(utilization, abs=0.002))
    assert predicted["peak_gib"] == pytest.approx(peak, abs=0.2)


@pytest.mark.parametrize(
    ("predicted", "peak", "said", "verdicts"),
    [
        (40.0, 44.0, "[qerl] base: the rollout uses 19.25 GiB of the actor's", [True, True]),
        (40.0, 45.0, "[qerl] base: a copy each: no IPC", [False, False]),
    ],
)
def test_verdicts(predicted, peak, said, verdicts):
    first = {"peaks": {"whole run": {"card_gib": peak}}, "steps": {1: {}}, "said": [said]}
    found = {"gpu": "H100", "base": "shared", "first": first, "predicted": {"peak_gib": predicted}}
    assert list(bench_memory.verdicts(found).values()) == verdicts
    resumed = {"exit_code": 0, "steps": {2: {}}}
    assert bench_memory.verdicts(found | {"resumed": resumed})["the resumed run goes on"]


def test_the_cgroups_memory_is_without_page_cache(tmp_path):
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\nshmem 100\n")
    assert bench_memory.cgroup_bytes(tmp_path) == 500
    assert bench_memory.cgroup_bytes(tmp_path / "nowhere") is None
