"""Measures the GPU and host memory of `python -m verl.trainer.main_ppo` from start to end, and the
start.

    python benchmarks/bench_memory.py --shape 32B --base shared --limit-gib 45 --json memory_32b.json
    python benchmarks/bench_memory.py --dry-run                              # tiny, on the CPU

The run is GRPO with the settings of the recipe (`gsm8k_grpo`, from 32B on `gsm8k_grpo_32b`), on a
random NVFP4 model of the true shape: 16 prompts of 256 tokens, 8 samples each, 512 generated tokens
without early end. `rollout.gpu_memory_utilization` is what the KV cache of these sequences needs.

- GPU memory is that of the whole card by nvidia-smi, every 0.2 s, less what it was before the run.
- With `--limit-gib` another process holds the rest of the card, so that the processes of the run
  find a card of that size.
- Host memory is the sum of PSS of the run's processes, and that of the cgroup and of the machine.
  Pinned memory is in the latter two alone.
- The prediction is that of `qerl plan` for the same settings.

The JSON file is written after each phase, and a line is printed every minute. Where the run fails
or the time of `--seconds` is over, the end of the log is in the file and the exit code is 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bench_grpo_step import SHORT, Case, Start, metrics_of, prepare  # noqa: E402
from result_file import ResultFile, visible_gpu  # noqa: E402

GIB, MIB = 2**30, 2**20
CARD_SECONDS, HOST_SECONDS = 0.2, 3.0
ENGINE_WORK = int(2.5 * GIB)
"""Memory of the rollout engine beside its base and KV cache: activations of its largest batch and
CUDA graphs."""

MARKER = "QERL_BENCH_RUN"
"""Environment variable by which the processes of a run are found."""

EVENTS = {
    "actor built": re.compile(r"\[qerl\] kernel: actor "),
    "rollout's model loaded": re.compile(r"\[qerl\] base: the rollout |Model loading took"),
    "rollout's engine up": re.compile(r"init engine .*took|server is ready|Application startup complete"),
    "training begins": re.compile(r"Training Progress:"),
}
"""The first line that matches ends the phase before it."""

STEP = re.compile(r"step:(\d+) - ")
SAID = re.compile(r"\[qerl\].* (?:base|kernel|recompute|attention): ")


def recipe_of(shape: str) -> str:
    """Returns the recipe for a model of this size."""
    return "gsm8k_grpo_32b" if shape.startswith(("32B", "72B")) else "gsm8k_grpo"


def overrides_of(args: argparse.Namespace, work: Path, steps: int) -> list[str]:
    """Returns the settings of the run beside the recipe's, without the rollout's share."""
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    out = [
        f"actor_rollout_ref.model.path={work / 'nvfp4'}",
        f"qerl.base={args.base}",
        f"data.train_files={work / 'prompts.parquet'}",
        f"data.val_files={work / 'prompts.parquet'}",
        f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={args.prompt}",
        f"data.max_response_length={args.response}",
        "data.dataloader_num_workers=0",
        f"{rollout}.n={args.samples}",
        f"{rollout}.ignore_eos=True",
        f"{actor}.ppo_mini_batch_size={args.prompts}",
        f"reward.custom_reward_function.path={work / 'reward.py'}",
        "reward.custom_reward_function.name=compute_score",
        "trainer.logger=[console]",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        f"trainer.save_freq={args.steps if args.resume else -1}",
        f"trainer.resume_mode={'auto' if args.resume else 'disable'}",
        f"trainer.default_local_dir={checkpoints_of(args, work)}",
    ]
    if args.dry_run:
        out += [
            f"{rollout}.agent.num_workers=1",
            "reward.num_workers=1",
            "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        ]
    return [*out, *args.extra]


def checkpoints_of(args: argparse.Namespace, work: Path) -> Path:
    """Returns the folder of this benchmark's checkpoints."""
    return work / f"checkpoints-{args.base}"


def cache_bytes(model, args: argparse.Namespace) -> int:
    """Returns the KV cache of all sequences. The samples of a prompt share its blocks."""
    block = 16
    tokens = args.prompts * (args.prompt + args.samples * (args.response + block))
    return model.cache_a_token * tokens


def predict(args: argparse.Namespace, work: Path, total: int) -> tuple[float, dict]:
    """Returns ``gpu_memory_utilization``, and what `qerl plan` says about the run.

    Args:
        args: the arguments.
        work: folder of model and prompts.
        total: bytes of the card.
    """
    from qerl_verl.cli.plan import read_run
    from qerl_verl.memory.estimate import estimate

    _, model, run = read_run(recipe_of(args.shape), overrides_of(args, work, args.steps), None)
    limit = int(args.limit_gib * GIB) if args.limit_gib else total
    engine = cache_bytes(model, args) + ENGINE_WORK + (0 if run.shared else model.base)
    if args.utilization:
        engine = int(args.utilization * total)
    else:  # at most what the actor leaves
        beside = sum(estimate(model, replace(run, utilization=engine / limit), limit).generating.values()) - engine
        engine = min(engine, int(0.95 * limit) - beside)
    utilization = math.floor(1000 * engine / total) / 1000
    found = estimate(model, replace(run, utilization=utilization * total / limit), limit)

    def parts(sizes: dict[str, int]) -> dict[str, float]:
        return {part: round(size / GIB, 2) for part, size in sizes.items() if size}

    return utilization, {
        "shared": run.shared,
        "peak_gib": round(found.peak / GIB, 2),
        "generating_gib": parts(found.generating),
        "training_gib": parts(found.training),
        "host_beside_processes_gib": parts(found.host),
        "kept_layers": found.kept_layers,
        "cache_tokens": found.cache_tokens,
        "problems": found.problems,
    }


class Meter:
    """Samples the memory of card and host in threads, by phase.

    Args:
        gpu: index of the card for nvidia-smi, or None without one.
        marker: value of :data:`MARKER` of the run's processes.
    """

    def __init__(self, gpu: str | None, marker: str):
        self._marker, self._own = marker, {os.getpid()}
        self.begin, self.phase = time.monotonic(), "start"
        self.before_mib: float | None = None
        self.card: list[tuple[float, float]] = []
        self._peaks: dict[str, dict[str, float]] = {}
        self.last: dict[str, float] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._smi: subprocess.Popen | None = None
        self._seen: dict[int, bool] = {}
        threads = [self._host]
        if gpu is not None:
            reader, writer = os.openpty()  # nvidia-smi writes whole blocks into a pipe
            query = ["nvidia-smi", "-i", gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            self._smi = subprocess.Popen([*query, "-lms", str(int(CARD_SECONDS * 1000))], stdout=writer)
            os.close(writer)
            self._lines = os.fdopen(reader, errors="replace")
            threads.append(self._read_card)
        self._threads = [threading.Thread(target=t, daemon=True) for t in threads]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_for_card(self) -> None:
        """Waits for the first sample, which is the card's memory before the run.

        Raises:
            SystemExit: nvidia-smi prints none.
        """
        while self._smi is not None and self.before_mib is None:
            if self.seconds() > 30 or self._smi.poll() is not None:
                self.stop()
                raise SystemExit("nvidia-smi prints no memory of the card")
            time.sleep(0.05)

    def seconds(self) -> float:
        return round(time.monotonic() - self.begin, 1)

    def note(self, **values: float) -> None:
        """Enters values into the peaks of the current phase and of the whole run."""
        with self._lock:
            self.last |= values
            for phase in (self.phase, "whole run"):
                peaks = self._peaks.setdefault(phase, {})
                for key, value in values.items():
                    peaks[key] = max(peaks.get(key, 0.0), round(value, 2))

    def peaks(self) -> dict[str, dict[str, float]]:
        """Returns phase -> name -> largest value so far."""
        with self._lock:
            return copy.deepcopy(self._peaks)

    def _read_card(self) -> None:
        with suppress(OSError):  # the terminal ends with nvidia-smi
            for line in self._lines:
                if self._stop.is_set():
                    return
                with suppress(ValueError):
                    used = float(line)
                    if self.before_mib is None:
                        self.before_mib = used
                    self.note(card_gib=(used - self.before_mib) / 1024)
                    if not self.card or abs(used - self.card[-1][1]) >= 64:
                        self.card.append((self.seconds(), used))

    def _host(self) -> None:
        import psutil

        start = psutil.virtual_memory()
        cgroup = cgroup_bytes()
        while not self._stop.is_set():
            values = {"machine_gib": (psutil.virtual_memory().used - start.used) / GIB, "pss_gib": 0.0}
            for process in self.processes():
                with suppress(psutil.Error, OSError):
                    values["pss_gib"] += process.memory_full_info().pss / GIB
            if cgroup is not None and (now := cgroup_bytes()) is not None:
                values["cgroup_gib"] = (now - cgroup) / GIB
            self.note(**values)
            self._stop.wait(HOST_SECONDS)

    def processes(self) -> list:
        """Returns the processes of the run."""
        import psutil

        found = []
        for process in psutil.process_iter():
            if (belongs := self._seen.get(process.pid)) is None:
                try:
                    belongs = process.environ().get(MARKER) == self._marker
                    # a process has its parent's environment until it executes its program
                    if belongs or time.time() - process.create_time() > 10:
                        self._seen[process.pid] = belongs
                except (psutil.Error, OSError):
                    continue
            if belongs:
                found.append(process)
        return found

    def stop(self) -> None:
        self._stop.set()
        if self._smi is not None:
            self._smi.kill()
            self._smi.wait()


def cgroup_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Returns the memory of this cgroup without its page cache, or None."""
    for usage, stat, cache in (
        (root / "memory.current", root / "memory.stat", "file"),
        (root / "memory/memory.usage_in_bytes", root / "memory/memory.stat", "total_cache"),
    ):
        with suppress(OSError, ValueError, KeyError):
            lines = dict(line.split() for line in stat.read_text().splitlines())
            shared = int(lines.get("shmem", lines.get("total_shmem", 0)))  # counts as cache, too
            return int(usage.read_text()) - int(lines[cache]) + shared
    return None


def hold_rest(limit_gib: float) -> None:
    """Takes all memory of the card but ``limit_gib``, and keeps it until standard input ends."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    rest = free - int(limit_gib * GIB)
    if rest < 0:
        raise SystemExit(f"--limit-gib {limit_gib}: only {free / GIB:.1f} GiB of the card are free")
    held = torch.empty(rest, dtype=torch.uint8, device="cuda")
    print(f"holding {rest / GIB:.2f} GiB", flush=True)
    sys.stdin.read()
    del held


@contextmanager
def limited(limit_gib: float | None) -> Iterator[None]:
    """Runs :func:`hold_rest` in another process."""
    if limit_gib is None:
        yield
        return
    line = [sys.executable, __file__, "--hold-rest", str(limit_gib)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline().strip()
            if not said:
                raise SystemExit(f"--limit-gib {limit_gib}: the card's memory could not be taken")
            print(said, flush=True)
            yield
        finally:
            process.stdin.close()


class Run:
    """One run of main_ppo under a :class:`Meter`.

    Args:
        line: the command.
        log: file for its output, each line with the seconds since the start.
        gpu: see :class:`Meter`.
        store: called with the results so far after each phase.
    """

    def __init__(self, line: list[str], log: Path, gpu: str | None, store):
        self.line, self.log, self._store = line, log, store
        self.marker = uuid.uuid4().hex
        self.meter = Meter(gpu, self.marker)
        self.found: dict = {"command": " ".join(line[1:]), "at_s": {}, "steps": {}, "said": []}
        self._tail: list[str] = []
        self._start = Start()

    def results(self) -> dict:
        meter = self.meter
        return self.found | {
            "start": self._start.describe(),
            "seconds": meter.seconds(),
            "peaks": meter.peaks(),
            "card_before_mib": meter.before_mib,
            "card_mib": list(meter.card),
        }

    def _end_phase(self, name: str) -> None:
        self.found["at_s"][name] = self.meter.seconds()
        self.meter.phase = f"after: {name}"
        self._store(self.results())

    def _see(self, text: str) -> None:
        self._start.see(self.meter.seconds(), text)
        for name, pattern in EVENTS.items():
            if name not in self.found["at_s"] and pattern.search(text):
                self._end_phase(name)
        if SAID.search(text):
            line = text[text.index("[qerl]") :].strip()
            if line not in self.found["said"] and len(self.found["said"]) < 60:
                self.found["said"].append(line)
        if found := STEP.search(text):
            values = metrics_of(text)
            self.found["steps"] |= values
            if not self.found.get("start_to_first_step_s"):
                took = values[int(found[1])].get("timing_s/step", 0.0)
                self.found["start_to_first_step_s"] = round(self.meter.seconds() - took, 1)
            self._end_phase(f"step {found[1]}")

    def _tell(self, done: threading.Event) -> None:
        while not done.wait(60):
            values = "  ".join(f"{key} {value:.1f}" for key, value in sorted(dict(self.meter.last).items()))
            print(f"{self.meter.seconds():.0f} s, {self.meter.phase}: {values}", flush=True)

    def execute(self, environment: dict[str, str]) -> bool:
        """Runs the command. Returns whether it ended with exit code 0 and printed a step."""
        done = threading.Event()
        threading.Thread(target=self._tell, args=(done,), daemon=True).start()
        self.meter.start()
        self.meter.wait_for_card()
        process = subprocess.Popen(
            self.line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**environment, MARKER: self.marker, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            self.found["exit_code"] = process.wait()
        except (KeyboardInterrupt, TimeoutError) as error:
            self.found["exit_code"] = None
            self.found["stopped"] = str(error) or "interrupted"
            self.found["stacks"] = self._stacks()
        finally:
            self._end(process)
            reader.join(10)  # a process that was left over would keep the pipe open
            done.set()
            self.meter.stop()
        good = self.found["exit_code"] == 0 and bool(self.found["steps"])
        if not good:
            self.found["last_lines"] = self._tail
        self._store(self.results())
        return good

    def _read(self, process: subprocess.Popen) -> None:
        with self.log.open("w", buffering=1) as file:
            for text in process.stdout:
                file.write(f"{self.meter.seconds():8.1f} {text}")
                self._tail = [*self._tail[-39:], text.rstrip()]
                self._see(text)

    def _stacks(self) -> dict[str, list[str]]:
        """Returns the end of each process's log, after the process has written its stacks there.

        PYTHONFAULTHANDLER writes the stacks of all threads at SIGABRT.
        """
        import psutil

        logs = {}
        for process in self.meter.processes():
            with suppress(psutil.Error, OSError):
                name, command = process.name(), " ".join(process.cmdline()[:3])
                if "python" in name + command or name.startswith(("ray::", "VLLM")):
                    logs[f"{process.pid} {name}"] = os.readlink(f"/proc/{process.pid}/fd/2")
                    process.send_signal(signal.SIGABRT)
        time.sleep(3)
        stacks = {}
        for name, file in logs.items():
            with suppress(OSError):
                if Path(file).is_file():
                    stacks[name] = Path(file).read_text(errors="replace").splitlines()[-60:]
        return stacks

    def _end(self, process: subprocess.Popen) -> None:
        """Ends every process of the run."""
        import psutil

        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        left = self.meter.processes()
        for other in left:
            with suppress(psutil.Error):
                other.kill()
        psutil.wait_procs(left, timeout=10)
        process.wait()


def out_of_time(*_) -> None:
    raise TimeoutError("the time of --seconds is over")


def interrupted(*_) -> None:
    raise KeyboardInterrupt


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B", help="of benchmarks/shapes.py (default: %(default)s)")
    parser.add_argument("--base", default="shared", choices=("separate", "shared"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=SHORT.prompts)
    parser.add_argument("--samples", type=int, default=SHORT.samples)
    parser.add_argument("--prompt", type=int, default=SHORT.prompt, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=SHORT.response, help="tokens of a response")
    parser.add_argument("--limit-gib", type=float, help="GPU memory that the run finds free")
    parser.add_argument("--utilization", type=float, help="the rollout's gpu_memory_utilization")
    parser.add_argument("--resume", action="store_true", help="save at the end, start again and do one more step")
    parser.add_argument("--seconds", type=int, default=3600, help="everything ends then (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/qerl-bench-memory"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--log", type=Path, help="file of the run's output (default: in the work folder)")
    parser.add_argument("--prepare", action="store_true", help="write model and prompts, and end")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--hold-rest", type=float, help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", help="more settings of verl")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.shape, args.prompts, args.samples, args.prompt, args.response = "tiny", 4, 2, 64, 8
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.hold_rest is not None:
        hold_rest(args.hold_rest)
        return 0
    work = args.work / f"{args.shape}-{args.prompt}"
    work.mkdir(parents=True, exist_ok=True)
    if args.prepare:
        prepare(
            work, args.shape, Case(args.prompts, args.samples, args.prompt, args.response, args.steps, ()), {"nvfp4"}
        )
        return 0
    signal.signal(signal.SIGALRM, out_of_time)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    signal.alarm(args.seconds)
    begin = time.monotonic()
    # in a process of its own, whose memory ends with it
    options = ["--prepare", "--shape", args.shape, "--work", str(args.work)]
    options += ["--prompts", str(args.prompts), "--prompt", str(args.prompt)]
    subprocess.run([sys.executable, __file__, *options, *(["--dry-run"] if args.dry_run else [])], check=True)
    gpu = None if args.dry_run else visible_gpu()
    name, total = (None, int(79.2 * GIB)) if gpu is None else card(gpu)
    new = {"shape": args.shape, "base": args.base, "limit_gib": args.limit_gib, "gpu": name}
    utilization, predicted = args.utilization, {}
    try:
        utilization, predicted = predict(args, work, total)
    except ValueError as error:  # the run itself may still be possible
        if utilization is None:
            raise SystemExit(f"{error}\ngive --utilization to run without a prediction") from error
        predicted["failed"] = str(error)
    new |= {"write_s": round(time.monotonic() - begin, 1), "utilization": utilization, "predicted": predicted}
    names, log = ["first", "resumed"] if args.resume else ["first"], args.log or work / f"{args.base}.log"
    with ResultFile(args.json, new) as result, limited(args.limit_gib if gpu is not None else None):
        for name in result.steps(names):
            if not measure(name, args, work, utilization, gpu, log, result):
                break
    return 0 if not result.content["failed"] and all(result.content["verdicts"].values()) else 1


def measure(
    name: str,
    args: argparse.Namespace,
    work: Path,
    utilization: float,
    gpu: str | None,
    log: Path,
    result: ResultFile,
) -> bool:
    """Runs main_ppo once and adds what was found to the result file. Returns whether it ended
    well."""
    again = name != "first"
    if not again:  # a run that resumes would not be the first
        shutil.rmtree(checkpoints_of(args, work), ignore_errors=True)
    overrides = overrides_of(args, work, args.steps + again)
    overrides += [f"actor_rollout_ref.rollout.gpu_memory_utilization={utilization}"]
    line = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-path", "pkg://qerl_verl.recipes"]

    def store(results: dict) -> None:
        result.content[name] = results
        result.content["verdicts"] = verdicts(result.content)
        result.save()

    log = log.with_name(f"resumed_{log.name}") if again else log
    run = Run([*line, "--config-name", recipe_of(args.shape), *overrides], log, gpu, store)
    good = run.execute(environment_of(args.dry_run))
    show(name, result.content)
    if not good:
        reason = run.found.get("stopped") or f"exit code {run.found['exit_code']}, {len(run.found['steps'])} steps"
        result.fail(name, reason)
    return good


def card(gpu: str) -> tuple[str, int]:
    """Returns name and bytes of a card."""
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    name, total = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().rsplit(", ", 1)
    return name, int(total) * MIB


def environment_of(on_cpu: bool) -> dict[str, str]:
    out = {"VERL_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_LEVEL": "INFO", **os.environ}
    out["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return out | ({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} if on_cpu else {})


def verdicts(found: dict) -> dict[str, bool]:
    """Returns the conditions that must hold, with their outcome. The card's are of a GPU alone."""
    out, first = {}, found["first"]
    peak = first["peaks"].get("whole run", {}).get("card_gib")
    predicted = found["predicted"].get("peak_gib")
    if found["gpu"] and peak and predicted and first["steps"]:
        out["the predicted peak is within 10 % of the measured one"] = abs(predicted / peak - 1) <= 0.1
    if found["base"] == "shared" and first["steps"]:
        out["actor and rollout share the base"] = any("base: the rollout uses" in line for line in first["said"])
    if "resumed" in found and found["resumed"].get("exit_code") is not None:
        out["the resumed run goes on"] = list(found["resumed"]["steps"]) == [max(first["steps"]) + 1]
    return out


def show(name: str, found: dict) -> None:
    """Prints a run in a few lines."""
    run = found[name]
    print(f"{name}: exit code {run['exit_code']}, {run['seconds']:.0f} s", flush=True)
    print(f"  to the first step: {run.get('start_to_first_step_s')} s; phases end at {json.dumps(run['at_s'])}")
    for phase, peaks in run["peaks"].items():
        print(f"  {phase}: {json.dumps(peaks)}")
    for step, values in run["steps"].items():
        print(f"  step {step}: {json.dumps({k: round(v, 5) for k, v in values.items()})}")
    print(f"  predicted peak: {found['predicted'].get('peak_gib')} GiB")
    for line in (*run["said"], *run.get("last_lines", ())):
        print(f"  | {line[:300]}")
    for what, holds in found.get("verdicts", {}).items():
        print(f"{'ok  ' if holds else 'FAIL'} {what}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
