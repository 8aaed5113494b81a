"""Reads the metrics of a run from the file of verl's ``file`` logger or from a console log.

verl's ``file`` logger (verl/utils/tracking.py, FileLogger) writes one JSON object per step,
``{"step": N, "data": {...}}``. Its ``console`` logger (verl/utils/logger/aggregate_logger.py)
prints ``step:N - key:value - key:value``, and Ray adds the name of the process.
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
"""Metric of every step that trained. A validation before training has the step of the last
update."""

METRICS_SUFFIX = ".jsonl"
RECORD_SUFFIX = ".settings.json"
"""Suffix of the record beside ``<stem>.jsonl``: ``<stem>.settings.json``."""
_PART = re.compile(r"(.+)\.(0|[1-9]\d*)\.jsonl")

_LOG_SUFFIXES = (".log", ".out", ".txt")
LOG_NAMES = ("log", *(f"*{suffix}" for suffix in _LOG_SUFFIXES))
"""Patterns of console logs, in a folder without a file of verl's ``file`` logger."""

_CONSOLE_STEP = re.compile(r"(?<![\w/])step:(\d+) - (.*)")
_CONSOLE_VALUE = re.compile(r"^(\S.*?):(?:np\.\w+\()?([-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|inf|nan))\)?\s*$")


@dataclass
class Run:
    """The metrics that one run logged.

    Attributes:
        name: the name shown to the user.
        path: the file that the metrics come from.
        steps: step -> metric -> value; NaN where verl did not log a number.
        notes: sentences about what was left out.
        settings: the run's configuration by dotted keys; None where it is not known.
        seed: the seed that distinguishes the run from others of its arm; None where it is not
            known.
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
        path: a file, or a folder. A folder without metrics is searched through its subfolders. In
            each folder the files of verl's ``file`` logger have precedence over console logs.

    Returns:
        One file per run, sorted by path.

    Raises:
        CompareError: nothing was found.
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
    """Returns the files whose names are those of console logs, sorted."""
    return sorted({p for name in LOG_NAMES for p in folder.glob(name) if p.is_file()})


def find_parts(path: Path) -> list[Path]:
    """Returns the files that the run logged to before it resumed, oldest first.

    These are ``<stem>.N.jsonl`` beside ``<stem>.jsonl``, and for a part the parts with lower
    numbers.
    """
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
    """Splits off the number of a part; it is None for the newest file.

    A name may end in a number of its own, as ``sigma_0.01``. A number is therefore that of a part
    only where the run's newest file or its record exists.
    """
    if match := _PART.fullmatch(path.name):
        stem = match.group(1)
        newest = (path.with_name(stem + suffix) for suffix in (METRICS_SUFFIX, RECORD_SUFFIX))
        if any(file.exists() for file in newest):
            return stem, int(match.group(2))
    return path.stem, None


def next_part(path: Path) -> Path:
    """Returns the name under which ``<stem>.jsonl`` becomes the newest part."""
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
    """Yields pairs of a kind and its content.

    The kinds are ``entry`` with (step, values), and ``damaged`` with whether the line has an end.
    """
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
"""Prefix of the rollout correction's metrics in verl's bypass mode, where they come with those of
the update (trainer_base.py, rename_dict)."""


def _aliases(values: dict[str, float]) -> dict[str, float]:
    prefix = f"{_BYPASS}rollout_corr/"
    return {key.removeprefix(_BYPASS): value for key, value in values.items() if key.startswith(prefix)}


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(data: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record as floats, without all other values.

    orjson writes NaN and infinities as null, which becomes NaN.
    """
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
    """Returns step -> metric -> value, and notes about what was left out.

    A resumed run logs steps again that were logged before the interruption. From the first repeated
    step on, the earlier lines belong to updates that were lost, and only the later lines count. A
    line without :data:`SCORE` is a validation and adds to its step. The parts of :func:`find_parts`
    come first.

    Raises:
        CompareError: the file holds no metrics.
        OSError: the file cannot be read.
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
