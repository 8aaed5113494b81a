"""The JSON file of one benchmark: written after every step, and taken up after an interruption.

    with ResultFile(args.json, {"command": ..., "times": []}) as result:
        for name in result.steps(args.kernels):
            result.content["times"].append(measure(name))

A step is what a benchmark can lose at most, for example one engine or one shape. The file is
replaced after each step, so that a benchmark which a time limit ends keeps what it has measured.
The next call with the same arguments skips these steps where code, GPU and versions are the same.

Fields of every file:

- ``made``: code, GPU, versions, commit and arguments of the measurement, and its seconds;
- ``finished``: names of the measured steps;
- ``failed``: step -> reason, for steps that gave no result;
- ``incomplete``: names what is missing. A complete file does not have it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qerl_verl.json_files import write_json_atomically

ROOT = Path(__file__).resolve().parent.parent
MEASURED_CODE = ("kernels", "qerl_verl", "benchmarks")
"""Folders whose Python and CUDA files decide what a benchmark measures."""
REPORTS = ("report.py", "run_all.py", "study_report.py", "summary.py")
"""Files of these folders that only start benchmarks or print results."""
PACKAGES = ("torch", "triton", "vllm", "verl", "transformers", "peft", "flash-attn")
CONDITIONS = ("code", "gpu", "versions")
"""Fields of ``made`` that two comparable results have in common."""
PLACES = ("--json", "--work", "--logs")
"""Options that name folders and files; they do not change a measurement."""


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


def visible_gpu() -> str:
    """Returns the first GPU that CUDA shows to this process, as ``nvidia-smi -i`` takes it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def hash_code(root: Path = ROOT) -> str:
    """Returns the hash of the files that decide what is measured.

    A commit that changes other files does not repeat a benchmark, and an uncommitted change does.
    """
    digest = hashlib.sha256()
    for folder in MEASURED_CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".yaml") and path.name not in REPORTS:
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


def read_result(path: Path) -> dict:
    """Returns the content of a result file; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def have_same_conditions(made: Any, machine: dict) -> bool:
    """Returns whether a result's ``made`` has the code, the GPU and the versions of a machine."""
    return isinstance(made, dict) and all(made.get(key) == machine[key] for key in CONDITIONS)


def command_of(argv: Sequence[str]) -> list[str]:
    """Returns script and arguments without the options of :data:`PLACES`; of other paths the
    name."""
    kept, skip = [Path(argv[0]).name], False
    for argument in argv[1:]:
        name, equals, _ = argument.partition("=")
        if skip or name in PLACES:
            skip = name in PLACES and not equals and not skip
            continue
        kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
    return kept


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


class ResultFile:
    """The result of one benchmark, see the module's docstring.

    Without a path everything works, and nothing is written.

    Attributes:
        path: the file, or None.
        content: what the file holds. The benchmark adds its fields to it.
    """

    def __init__(self, path: Path | str | None, content: dict, argv: Sequence[str] | None = None):
        """Takes up the file of an interrupted call of the same command, code, GPU and versions.

        Args:
            path: the file. A complete one, or one of other conditions, is replaced.
            content: fields of a new file.
            argv: command of the benchmark, by default that of this process.
        """
        self.path = Path(path) if path else None
        self._began, self._names, self._previous = time.monotonic(), [], None
        machine = describe_machine((gpu_names() or ["none"])[0])
        found = read_result(self.path) if self.path else {}
        arguments, made = command_of(argv or sys.argv), found.get("made")
        same = have_same_conditions(made, machine) and made.get("arguments") == arguments
        self.content = found if same and "incomplete" in found else dict(content)
        self._seconds_before = self.content.get("made", {}).get("seconds", 0.0)
        self.content["made"] = machine | {"arguments": arguments}
        self.content.setdefault("finished", [])
        self.content["failed"] = {}

    def __enter__(self) -> ResultFile:
        """Lets SIGTERM, which a time limit sends, end the benchmark as an exception does: temporary
        folders are removed, and the processes that it waits for are ended."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.save(ended=kind is None)
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def left(self, names: Iterable[str]) -> list[str]:
        """Returns the steps that the file does not have."""
        return [name for name in names if name not in self.content["finished"]]

    def steps(self, names: Iterable[str]) -> Iterator[str]:
        """Yields the steps to measure, and writes the file when the loop comes back for the next.

        A step that the loop leaves by ``break`` or an exception is not finished.

        Args:
            names: all steps of the loop. Those that the file has already are left out.
        """
        names = list(names)
        self._names += names
        if there := [name for name in names if name in self.content["finished"]]:
            print(f"from an interrupted call: {', '.join(there)}", flush=True)
        for name in self.left(names):
            yield name
            if name not in self.content["failed"]:
                self.content["finished"].append(name)
            self.save()

    def fail(self, step: str, reason: str) -> None:
        """Records that a step of :meth:`steps` gave no result. The next call measures it again."""
        self.content["failed"][step] = reason
        print(f"{step}: {reason}", flush=True)

    def save(self, ended: bool = False) -> None:
        """Replaces the file.

        Args:
            ended: the benchmark has run to its end, and the file is complete if no step failed.
        """
        missing = self.left(self._names)
        if ended and not missing:
            self.content.pop("incomplete", None)
        else:
            self.content["incomplete"] = f"without {', '.join(missing)}" if missing else "not at its end"
        seconds = self._seconds_before + time.monotonic() - self._began
        self.content["made"]["seconds"] = round(seconds, 1)
        if self.path:
            write_json_atomically(self.path, self.content)

    @property
    def exit_code(self) -> int:
        """1 where a step failed, otherwise 0."""
        return 1 if self.content["failed"] else 0
