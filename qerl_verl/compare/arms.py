"""Groups the arguments of ``qerl compare`` into arms: finds the runs, and the seeds of each arm."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qerl_verl.compare.errors import CompareError
from qerl_verl.compare.runs import Run, find_metrics_files, read_steps
from qerl_verl.compare.settings import find_seed, read_settings

_SEED_SUFFIX = re.compile(r"^(.+?)[._-](?:s|seed)[._=-]?(\d+)$", re.IGNORECASE)
_ONLY_SEED = re.compile(r"^(?:s|seed)[._=-]?(\d+)$", re.IGNORECASE)
_PLAIN_STEMS = {"log", "metrics", "train", "console", "stdout", "output", "run", "main_ppo", "verl"}
"""File names that say nothing about the run; the name of the folder replaces them."""


@dataclass
class Grouping:
    """The runs, grouped by arm.

    Attributes:
        arms: arm -> its runs. Arms are in the order of the arguments, runs in the order of seeds.
        notes: sentences that explain the grouping.
    """

    arms: dict[str, list[Run]]
    notes: list[str] = field(default_factory=list)


def split_seed(name: str, folder: str = "") -> tuple[str, int | None]:
    """Splits a run's name into an arm and a seed.

    ``nvfp4_s1``, ``nvfp4-seed1`` and a run ``seed1`` in the folder ``nvfp4`` are seed 1 of
    ``nvfp4``. A name without a seed at its end is an arm, with None as the seed.
    """
    if match := _SEED_SUFFIX.match(name):
        return match.group(1), int(match.group(2))
    if folder and (match := _ONLY_SEED.match(name)):
        return folder, int(match.group(1))
    return name, None


def group_runs(arguments: Sequence[str]) -> Grouping:
    """Reads the runs that the arguments name and groups them.

    Args:
        arguments: files or folders; or ``ARM=GLOB``, whose matches are runs of that arm. An arm may
            be given more than once. An existing path is a path even with ``=`` in it.

    Raises:
        CompareError: nothing matches, a file holds no metrics, or a run is in two arms.
    """
    found: list[tuple[str | None, Path, Path]] = []  # arm, argument, file
    for argument in arguments:
        arm, path = _split_argument(argument)
        for place in _expand(path, argument):
            found += [(arm, place, file) for file in find_metrics_files(place)]
    owners: dict[Path, str | None] = {}
    unique = []
    for arm, place, file in found:
        real = file.resolve()
        if real not in owners:
            owners[real] = arm
            unique.append((arm, place, file))
        elif owners[real] != arm:
            raise CompareError(
                f"{file} is in two arms, {owners[real] or 'its own'} and {arm or 'its own'}: "
                "make the arguments disjoint"
            )
    files_in = Counter(file.parent for _, _, file in unique)
    files_of = Counter(place for _, place, _ in unique)
    names = _unique_names([(_name(place, file, files_in, files_of), file) for _, place, file in unique])
    arms: dict[str, list[Run]] = {}
    automatic: set[str] = set()
    for (arm, _, file), name in zip(unique, names, strict=True):
        steps, run_notes = read_steps(file)
        settings = read_settings(file, alone=files_in[file.parent] == 1)
        by_name, seed = split_seed(name.rpartition("/")[2], file.parent.parent.name)
        if arm is None:
            automatic.add(by_name)
        seed = find_seed(settings) if seed is None else seed
        arms.setdefault(arm or by_name, []).append(Run(name, file, steps, run_notes, settings, seed))
    for runs in arms.values():
        runs.sort(key=lambda run: (run.seed is None, run.seed or 0, run.name))
    return Grouping(arms, _describe(arms, automatic))


def _split_argument(argument: str) -> tuple[str | None, str]:
    arm, equals, pattern = argument.partition("=")
    if not equals or os.path.exists(argument) or "/" in arm:
        return None, argument
    if not arm or not pattern:
        raise CompareError(f"{argument}: give a file or a folder, or ARM=GLOB")
    return arm, pattern


def _expand(pattern: str, argument: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [Path(pattern)]
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise CompareError(f"{argument}: no file or folder matches (looked in {os.getcwd()})")
    return paths


def _name(place: Path, file: Path, files_in: Counter, files_of: Counter) -> str:
    """Returns the argument's name if it names one run, otherwise what distinguishes its runs."""
    if place.is_dir() and files_of[place] == 1:
        return place.resolve().name
    if files_in[file.parent] == 1 and (place.is_dir() or _is_plain(file)):
        return file.resolve().parent.name
    return _stem(file)


def _stem(file: Path) -> str:
    """Returns the file's name without a known suffix; names of runs often contain other dots."""
    return file.name[: -len(file.suffix)] if file.suffix in (".jsonl", ".log", ".txt", ".out") else file.name


def _is_plain(file: Path) -> bool:
    return _stem(file).lower() in _PLAIN_STEMS


def _unique_names(named: list[tuple[str, Path]]) -> list[str]:
    """Prefixes names that occur more than once with the name of the folder above."""
    counts = Counter(name for name, _ in named)
    out = []
    for name, file in named:
        folder = file.resolve().parent
        above = folder.parent if folder.name == name else folder
        out.append(f"{above.name}/{name}" if counts[name] > 1 else name)
    still = Counter(out)
    return [str(file) if still[name] > 1 else name for name, (_, file) in zip(out, named, strict=True)]


def _describe(arms: dict[str, list[Run]], automatic: set[str]) -> list[str]:
    out = []
    if grouped := [arm for arm in arms if arm in automatic and len(arms[arm]) > 1]:
        out.append("grouped by their names without the seed (ARM=GLOB groups by hand): " + ", ".join(grouped))
    for arm, runs in arms.items():
        counts = Counter(run.seed for run in runs if run.seed is not None)
        if same := [seed for seed, count in counts.items() if count > 1]:
            out.append(
                f"arm {arm}: seed {', '.join(map(str, same))} occurs more than once; each run "
                "counts as a seed of its own"
            )
            for run in runs:
                run.seed = None if run.seed in same else run.seed
    return out
