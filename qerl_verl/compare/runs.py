"""The metrics of one run, from the file of verl's ``file`` logger or from a console log.

verl's ``file`` logger (verl/utils/tracking.py, FileLogger) writes one JSON object a step,
``{"step": N, "data": {...}}``. Its ``console`` logger (verl/utils/logger/aggregate_logger.py)
prints ``step:N - key:value - key:value``, to which Ray adds the name of the process.
"""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qerl_verl.compare.errors import CompareError

SCORE = "critic/score/mean"
"""What marks a step that trained; a validation before training has the step of the last update."""

METRICS_SUFFIX = ".jsonl"
RECORD_SUFFIX = ".settings.json"
"""Of the record beside ``<stem>.jsonl``: ``<stem>.settings.json``."""
_PART = re.compile(r"(.+)\.(0|[1-9]\d*)\.jsonl")

_LOG_SUFFIXES = (".log", ".out", ".txt")
LOG_NAMES = ("log", *(f"*{suffix}" for suffix in _LOG_SUFFIXES))
"""Console logs in a folder that holds no file of verl's ``file`` logger."""

_CONSOLE_STEP = re.compile(r"(?<![\w/])step:(\d+) - (.*)")
_CONSOLE_VALUE = re.compile(r"^(\S.*?):(?:np\.\w+\()?([-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|inf|nan))\)?\s*$")


@dataclass
class Run:
    """What one run logged.

    Attributes:
        name: shown to the user.
        path: the file that the metrics come from.
        steps: step -> metric -> value; NaN where verl logged no number.
        notes: sentences about what was left out.
        settings: the run's configuration by dotted keys, None where it is not known.
        seed: the seed that tells the run from others of its arm, None where it is not known.
    """

    name: str
    path: Path
    steps: dict[int, dict[str, float]]
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    seed: int | None = None

    def training_steps(self, metric: str = SCORE) -> list[int]:
        """Returns the steps that logged ``metric``, in order."""
        return sorted(step for step, values in self.steps.items() if metric in values)

    def series(self, metric: str, steps: list[int]) -> np.ndarray:
        """Returns ``[len(steps)]`` float64, NaN where a step did not log ``metric``."""
        values = [self.steps.get(step, {}).get(metric, math.nan) for step in steps]
        return np.array(values, dtype=np.float64)

    def metrics(self) -> set[str]:
        """Returns the names of all metrics that the run logged at any step."""
        return set().union(*self.steps.values())


def find_metrics_files(path: Path) -> list[Path]:
    """Returns the files of the runs that a RUN argument names.

    Args:
        path: a file; or a folder, which is searched itself and, where it holds none, its
            subfolders. In each folder the files of verl's ``file`` logger come before console logs.

    Returns:
        One file a run, sorted by path.

    Raises:
        CompareError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CompareError(f"{path}: there is no such file or folder")
    found = _files_in(path)
    if not found:
        subfolders = sorted(p for p in path.iterdir() if p.is_dir())
        found = [file for folder in subfolders for file in _files_in(folder)]
    if not found:
        raise CompareError(
            f"{path} holds no metrics of a verl run. Give the file of verl's file logger "
            "(trainer.logger=[console,file] writes it to $VERL_FILE_LOGGER_PATH) or a console log."
        )
    return found


def find_logs(folder: Path) -> list[Path]:
    """Returns the files that are console logs by their names, sorted."""
    return sorted({p for name in LOG_NAMES for p in folder.glob(name) if p.is_file()})


def find_parts(path: Path) -> list[Path]:
    """Returns what the run logged before it resumed, the oldest first: ``<stem>.N.jsonl`` beside
    ``<stem>.jsonl``, and beside a part those with lower numbers."""
    if path.suffix in _LOG_SUFFIXES:
        return []
    stem, newest = _split_part(path)
    found = {}
    for other in path.parent.glob(f"{glob.escape(stem)}.*{METRICS_SUFFIX}"):
        base, number = _split_part(other)
        if base == stem and number is not None and (newest is None or number < newest):
            found[number] = other
    return [found[number] for number in sorted(found)]


def _split_part(path: Path) -> tuple[str, int | None]:
    """Returns the stem without the number of a part, and that number; None for the newest file.

    A name may end in a number of its own, as ``sigma_0.01``. So a number is that of a part only
    where the run's newest file or its record is there.
    """
    if match := _PART.fullmatch(path.name):
        stem = match.group(1)
        newest = (path.with_name(stem + suffix) for suffix in (METRICS_SUFFIX, RECORD_SUFFIX))
        if any(file.exists() for file in newest):
            return stem, int(match.group(2))
    return path.stem, None


def next_part(path: Path) -> Path:
    """Returns the name under which ``<stem>.jsonl`` becomes the newest of its parts."""
    number = 0
    while (part := path.with_name(f"{path.stem}.{number}{METRICS_SUFFIX}")).exists():
        number += 1
    return part


def _files_in(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.glob(f"*{METRICS_SUFFIX}")) if p.is_file()]
    parts = {part for file in files for part in find_parts(file)}
    files = [p for p in files if p not in parts and any(map(_has_metrics, (p, *find_parts(p))))]
    if files:
        return files
    return [p for p in find_logs(folder) if _has_metrics(p)]


def _has_metrics(path: Path) -> bool:
    return any(True for kind, _ in _entries(path) if kind == "entry")


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the pairs of a kind and what belongs to it: ``entry`` with (step, values), ``damaged``
    with whether the line has an end."""
    with path.open("rb") as file:
        for raw in file:
            line = raw.decode("utf-8", errors="replace").rstrip()
            if line.startswith("{"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    if line.startswith('{"step"'):
                        yield "damaged", raw.endswith(b"\n")
                    continue
                if isinstance(entry, dict) and isinstance(entry.get("data"), dict) and _is_step(entry.get("step")):
                    yield "entry", (entry["step"], _numbers(entry["data"]))
            elif match := _CONSOLE_STEP.search(line):
                if values := _console_values(match.group(2)):
                    yield "entry", (int(match.group(1)), values)


_BYPASS = "actor/"
"""In verl's bypass mode the metrics of the rollout correction come with the update's, and get its
prefix (trainer_base.py, rename_dict)."""


def _aliases(values: dict[str, float]) -> dict[str, float]:
    prefix = f"{_BYPASS}rollout_corr/"
    return {key.removeprefix(_BYPASS): value for key, value in values.items() if key.startswith(prefix)}


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(data: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers as floats; orjson writes NaN and infinities as null. Anything else is
    left out."""
    out = {}
    for key, value in data.items():
        if value is None:
            out[key] = math.nan
        elif isinstance(value, (int, float)):
            out[key] = float(value)
    return out


def _console_values(text: str) -> dict[str, float]:
    out = {}
    for part in text.split(" - "):
        if match := _CONSOLE_VALUE.match(part):
            out[match.group(1)] = float(match.group(2))
    return out


def read_steps(path: Path) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Returns the metrics by step, and notes about what was left out.

    A run that resumed logs steps again that were logged before it was interrupted. From the first
    step that repeats, what was logged earlier belongs to updates that were lost, and only the later
    lines count. A line without :data:`SCORE` is a validation and adds to its step. The parts that
    :func:`find_parts` finds come first.

    Raises:
        CompareError: the file holds no metrics.
        OSError: it cannot be read.
    """
    steps: dict[int, dict[str, float]] = {}
    repeated: set[int] = set()
    damaged, cut_off, parts = 0, 0, find_parts(path)
    for kind, what in (entry for file in (*parts, path) for entry in _entries(file)):
        if kind == "damaged":
            damaged += what
            cut_off += not what
            continue
        step, values = what
        lost = {s for s in steps if s > step or (s == step and SCORE in values and SCORE in steps[s])}
        repeated |= lost
        for s in lost:
            del steps[s]
        steps.setdefault(step, {}).update(_aliases(values) | values)
    if not steps:
        raise CompareError(
            f"{path} holds no metrics of a verl run: neither lines of verl's file logger nor `step:N - key:value` lines"
        )
    notes = []
    if repeated:
        notes.append(
            f"was resumed or restarted: steps {min(repeated)} to {max(repeated)} were logged more "
            "than once or lost; the later lines count"
        )
    if parts:
        notes.append(f"read from {len(parts) + 1} files, since it was resumed")
    if cut_off:
        notes.append("the last line is cut off and left out")
    if damaged:
        notes.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return steps, notes
