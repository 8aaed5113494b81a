"""Compares arms: curves with bootstrap intervals, final values, and differences from a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from qerl_verl.compare import metrics as names
from qerl_verl.compare.errors import CompareError
from qerl_verl.compare.runs import SCORE, Run
from qerl_verl.compare.settings import Agreement, compare_settings
from qerl_verl.compare.statistics import Bootstrap, Interval, moving_average

REWARD, FIRST, LAST, WHOLE, TIME = "reward", "first", "last", "whole", "seconds"
"""Groups of quantities; each group is a table."""

FEW_SEEDS = 5


@dataclass(frozen=True)
class Options:
    """What ``qerl compare`` computes.

    Attributes:
        baseline: arm that the others are compared with; None takes the first.
        reward: metric of the reward.
        more: further metrics.
        window: number of steps that first and last values average over, at most half of the steps.
        smooth: odd number of steps of the centred moving average, for curves and for reached
            rewards.
        reach: rewards whose first step is reported; empty takes the baseline's last value.
        up_to: last step of the comparison; None takes the last one that all runs have.
        min_steps: runs with fewer training steps are left out.
        bootstrap: settings of the intervals.
        allow_differences: compare runs with other data or rewards, and say so.
    """

    baseline: str | None = None
    reward: str = SCORE
    more: tuple[str, ...] = ()
    window: int = 10
    smooth: int = 5
    reach: tuple[float, ...] = ()
    up_to: int | None = None
    min_steps: int = 1
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    allow_differences: bool = False


@dataclass(frozen=True)
class Difference:
    """An arm's value minus the baseline's.

    Attributes:
        interval: mean difference.
        paired: the seeds over which the difference was taken in pairs; empty where the arms were
            resampled independently.
    """

    interval: Interval
    paired: tuple[int, ...] = ()


@dataclass(frozen=True)
class Quantity:
    """One column of a table.

    Attributes:
        id: unique name, for programs.
        group: the table.
        label: heading of the column.
        steps: whether the value is a number of steps, so that arms are shown by their median.
        values: arm -> run -> value.
        arms: arm -> its interval.
        differences: arm -> difference from the baseline, for all other arms.
    """

    id: str
    group: str
    label: str
    steps: bool
    values: dict[str, dict[str, float]]
    arms: dict[str, Interval]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class Curve:
    """One arm's metric by step: mean over runs and pointwise limits, ``[len(steps)]`` each."""

    steps: list[int]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        arms: arm -> its runs, the baseline first.
        baseline: name of the baseline.
        steps: training steps that all runs have. First and last values and the area refer to them.
        window: number of steps of first and last values, :attr:`Options.window` within its bounds.
        quantities: columns of the tables.
        curves: metric -> arm -> curve, smoothed except for validations and sigma.
        agreement: comparison of the runs' settings.
        notes: sentences for the reader, the most important first.
        options: the requested options.
    """

    arms: dict[str, list[Run]]
    baseline: str
    steps: list[int]
    window: int
    quantities: list[Quantity]
    curves: dict[str, dict[str, Curve]]
    agreement: Agreement
    notes: list[str]
    options: Options

    def group(self, group: str) -> list[Quantity]:
        """Returns the quantities of one table."""
        return [q for q in self.quantities if q.group == group]


def compare(arms: Mapping[str, list[Run]], options: Options, notes: Sequence[str] = ()) -> Comparison:
    """Compares arms.

    Args:
        arms: arm -> its runs, see :func:`qerl_verl.compare.arms.group_runs`.
        options: what to compute.
        notes: sentences to pass on, see :class:`Comparison`.

    Raises:
        CompareError: the baseline is not one of the arms, a run has no training step, no step is
            common to all runs, or settings differ that define the reward.
    """
    arms, left_out = _with_enough_steps(arms, options)
    baseline = options.baseline or next(iter(arms))
    if baseline not in arms:
        raise CompareError(f"--baseline {baseline}: the arms are {', '.join(arms)}")
    arms = {baseline: arms[baseline]} | arms
    agreement = compare_settings(arms)
    said = _refuse_or_name(agreement, options)
    steps, about_steps = _common_steps(arms, options)
    said += [*left_out, *notes, *about_steps, *_about_runs(arms), *_about_seeds(arms, agreement)]
    window = max(1, min(options.window, len(steps) // 2))
    builder = _Builder(arms, baseline, options.bootstrap)
    _add_rewards(builder, arms, baseline, steps, window, options)
    _add_policy(builder, arms, steps, window, options)
    _add_seconds(builder, arms, steps)
    curves = _curves(arms, steps, options)
    return Comparison(arms, baseline, steps, window, builder.quantities, curves, agreement, said, options)


def _with_enough_steps(arms: Mapping[str, list[Run]], options: Options) -> tuple[dict[str, list[Run]], list[str]]:
    kept, notes = {}, []
    for arm, runs in arms.items():
        for run in runs:
            trained = len(run.training_steps(options.reward))
            if trained >= max(1, options.min_steps):
                kept.setdefault(arm, []).append(run)
            elif trained or options.min_steps > 1:
                notes.append(
                    f"{run.name} is left out: it has {trained} training steps (--min-steps {options.min_steps})"
                )
            else:
                raise CompareError(f"{run.path} {_why_no_steps(run, options.reward)}")
    if not kept:
        raise CompareError(f"no run has {options.min_steps} training steps; lower --min-steps")
    return kept, notes


def _why_no_steps(run: Run, reward: str) -> str:
    if reward == SCORE:
        return f"logged no training step (no {SCORE}): leave it out, or give --reward METRIC where it has another name"
    near = [key for key in sorted(run.metrics()) if key.split("/")[0] == reward.split("/")[0]]
    return f"did not log --reward {reward}; it has {', '.join(near) or 'nothing under that name'}"


def _refuse_or_name(agreement: Agreement, options: Options) -> list[str]:
    if agreement.conflicts and not options.allow_differences:
        listed = "".join(f"\n  - {conflict}" for conflict in agreement.conflicts)
        raise CompareError(
            f"the runs cannot be compared:{listed}\nCompare runs that share these, or pass "
            "--allow-differences: then every output names them."
        )
    return [f"NOT THE SAME: {conflict}" for conflict in agreement.conflicts]


def _common_steps(arms: Mapping[str, list[Run]], options: Options) -> tuple[list[int], list[str]]:
    runs = [run for group in arms.values() for run in group]
    sets = {run.name: set(run.training_steps(options.reward)) for run in runs}
    common = set.intersection(*sets.values())
    if options.up_to is not None:
        common = {step for step in common if step <= options.up_to}
    if not common:
        spans = ", ".join(f"{name} {min(s)} to {max(s)}" for name, s in sets.items())
        raise CompareError(
            f"no training step is common to all runs (steps: {spans}). A file that verl began anew "
            "when a run resumed lacks the steps before: join the parts, oldest first "
            "(cat part1 part2 > run.jsonl)."
        )
    steps, notes = sorted(common), []
    last = {name: max(s) for name, s in sets.items()}
    if max(last.values()) > steps[-1] and options.up_to is None:
        shortest = [name for name, step in last.items() if step == min(last.values())]
        notes.append(
            f"steps {steps[0]} to {steps[-1]} are compared, which all runs have: {_join(shortest)} "
            f"end{'s' if len(shortest) == 1 else ''} there, the longest at {max(last.values())}. "
            "--min-steps leaves short runs out"
        )
    missing = {n: len([x for x in range(steps[0], steps[-1] + 1) if x not in s]) for n, s in sets.items()}
    if gaps := {name: count for name, count in missing.items() if count}:
        notes.append("steps that are missing: " + ", ".join(f"{count} in {name}" for name, count in gaps.items()))
    return steps, notes


def _join(items: Sequence[str], most: int = 3) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")


def _about_runs(arms: Mapping[str, list[Run]]) -> list[str]:
    return [f"{run.name}: {note}" for runs in arms.values() for run in runs for note in run.notes]


def _about_seeds(arms: Mapping[str, list[Run]], agreement: Agreement) -> list[str]:
    out = []
    if single := [arm for arm, runs in arms.items() if len(runs) == 1]:
        out.append(f"one run only, so no interval: {_join(single, 8)}")
    if few := [arm for arm, runs in arms.items() if 1 < len(runs) < FEW_SEEDS]:
        out.append(f"with fewer than {FEW_SEEDS} runs a bootstrap interval is too narrow: {_join(few, 8)}")
    if agreement.unknown:
        out.append(
            "settings not known, so not checked for the same data, reward and lengths: "
            f"{_join(agreement.unknown)} (no record of the switch, no .hydra folder, no printed "
            "configuration)"
        )
    return out


class _Builder:
    """Collects quantities, each with its intervals and differences."""

    def __init__(self, arms: Mapping[str, list[Run]], baseline: str, bootstrap: Bootstrap):
        self.arms, self.baseline, self.bootstrap = arms, baseline, bootstrap
        self.quantities: list[Quantity] = []

    def add(self, id: str, group: str, label: str, of: Callable[[Run], float], steps: bool = False) -> None:
        """Adds a quantity unless no run has it.

        Args:
            id, group, label, steps: see :class:`Quantity`.
            of: returns the value of one run, NaN where it has none.
        """
        values = {arm: {run.name: of(run) for run in runs} for arm, runs in self.arms.items()}
        if all(math.isnan(v) for by_run in values.values() for v in by_run.values()):
            return
        estimate = self.bootstrap.median if steps else self.bootstrap.mean
        intervals = {arm: estimate(np.array(list(by_run.values())), arm) for arm, by_run in values.items()}
        differences = {arm: self._difference(values, arm, steps) for arm in self.arms if arm != self.baseline}
        self.quantities.append(Quantity(id, group, label, steps, values, intervals, differences))

    def _difference(self, values: dict[str, dict[str, float]], arm: str, steps: bool) -> Difference:
        one, other = self._by_seed(values, arm), self._by_seed(values, self.baseline)
        if any(math.isinf(v) for v in (*values[arm].values(), *values[self.baseline].values())):
            return Difference(Interval(math.nan))  # some runs never reached it
        common = sorted(one.keys() & other.keys())
        if len(common) >= 2:
            pairs = np.array([one[seed] - other[seed] for seed in common])
            return Difference(self.bootstrap.paired_difference(pairs, arm), tuple(common))
        return Difference(self.bootstrap.difference(values[arm], values[self.baseline], (arm, self.baseline)))

    def _by_seed(self, values: dict[str, dict[str, float]], arm: str) -> dict[int, float]:
        found = {run.seed: values[arm][run.name] for run in self.arms[arm] if run.seed is not None}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}


def _mean(run: Run, metric: str, steps: list[int]) -> float:
    values = run.series(metric, steps)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _median(run: Run, metric: str, steps: list[int]) -> float:
    """Returns the median over the steps that logged a metric, if at least half of them did."""
    values = run.series(metric, steps)
    values = values[~np.isnan(values)]
    return float(np.median(values)) if 2 * len(values) >= len(steps) else math.nan


def area(values: np.ndarray, steps: list[int]) -> float:
    """Returns the mean height of a curve: its area by the trapezoidal rule, divided by its width.

    Args:
        values: ``[len(steps)]``; NaN is left out.
        steps: the steps of the values.
    """
    known = ~np.isnan(values)
    at, values = np.asarray(steps, dtype=np.float64)[known], values[known]
    if len(at) < 2:
        return float(values[0]) if len(at) else math.nan
    return float(np.trapezoid(values, at) / (at[-1] - at[0]))


def first_step_at(values: np.ndarray, steps: list[int], level: float, smooth: int) -> float:
    """Returns the first step whose moving average is ``level`` or more, or infinity."""
    reached = np.flatnonzero(moving_average(values, smooth) >= level)
    return float(steps[reached[0]]) if len(reached) else math.inf


def _step_of_reward(run: Run, reward: str, steps: list[int], level: float, smooth: int) -> float:
    return first_step_at(run.series(reward, steps), steps, level, smooth)


def _add_rewards(
    builder: _Builder,
    arms: Mapping[str, list[Run]],
    baseline: str,
    steps: list[int],
    window: int,
    options: Options,
) -> None:
    reward = options.reward
    builder.add(
        f"{REWARD}/first",
        REWARD,
        f"first {window} steps",
        lambda run: _mean(run, reward, steps[:window]),
    )
    builder.add(
        f"{REWARD}/last",
        REWARD,
        f"last {window} steps",
        lambda run: _mean(run, reward, steps[-window:]),
    )
    builder.add(
        f"{REWARD}/area",
        REWARD,
        "area under the curve / steps",
        lambda run: area(run.series(reward, steps), steps),
    )
    last = next((q for q in builder.quantities if q.id == f"{REWARD}/last"), None)
    levels = options.reach or ([last.arms[baseline].value] if last else [])
    for level in levels:
        if math.isnan(level):
            continue
        text = f"steps to {level:.4g}" + ("" if options.reach else f" ({baseline}'s last)")
        builder.add(
            f"{REWARD}/reach/{level:.6g}",
            REWARD,
            text,
            partial(_step_of_reward, reward=reward, steps=steps, level=level, smooth=options.smooth),
            steps=True,
        )
    keys = {key for runs in arms.values() for run in runs for key in run.metrics()}
    for key in names.validation_keys(keys):
        sets = [
            {s for s, v in run.steps.items() if key in v and s <= steps[-1]}
            for runs in arms.values()
            for run in runs
            if key in run.metrics()
        ]
        if common := sorted(set.intersection(*sets)):
            first, last_step = common[0], common[-1]
            label = names.find_metric(key).label
            builder.add(
                f"{key}/first",
                REWARD,
                f"{label}, step {first}",
                partial(_mean, metric=key, steps=[first]),
            )
            if last_step != first:
                builder.add(
                    f"{key}/last",
                    REWARD,
                    f"{label}, step {last_step}",
                    partial(_mean, metric=key, steps=[last_step]),
                )


def _policy_metrics(options: Options) -> list[names.Metric]:
    return [*names.POLICY, *(names.find_metric(key) for key in options.more)]


def _add_policy(
    builder: _Builder,
    arms: Mapping[str, list[Run]],
    steps: list[int],
    window: int,
    options: Options,
) -> None:
    for group, part in ((FIRST, steps[:window]), (LAST, steps[-window:]), (WHOLE, steps)):
        for metric in _policy_metrics(options):
            builder.add(
                f"{metric.key}/{group}",
                group,
                metric.label,
                partial(_mean, metric=metric.key, steps=part),
            )


def _add_seconds(builder: _Builder, arms: Mapping[str, list[Run]], steps: list[int]) -> None:
    keys = {key for runs in arms.values() for run in runs for key in run.metrics()}
    for key in [names.STEP_SECONDS, *names.second_keys(keys)]:
        builder.add(key, TIME, key.removeprefix("timing_s/"), partial(_median, metric=key, steps=steps))


def _curves(arms: Mapping[str, list[Run]], steps: list[int], options: Options) -> dict[str, dict[str, Curve]]:
    keys = {key for runs in arms.values() for run in runs for key in run.metrics()}
    wanted = [options.reward, *names.validation_keys(keys), *names.PANELS, *options.more]
    out: dict[str, dict[str, Curve]] = {}
    for key in dict.fromkeys(wanted):
        smooth = 1 if names.VALIDATION.match(key) or key in names.STEPPED else options.smooth
        for arm, runs in arms.items():
            having = [run for run in runs if key in run.metrics()]
            if having:
                curve = _curve(having, key, arm, smooth, options)
                if curve is not None:
                    out.setdefault(key, {})[arm] = curve
    return out


def _curve(runs: list[Run], key: str, arm: str, smooth: int, options: Options) -> Curve | None:
    """Returns the curve over the steps that all runs of the arm have, or None."""
    sets = [{s for s, v in run.steps.items() if key in v} for run in runs]
    steps = sorted(set.intersection(*sets))
    if options.up_to is not None:
        steps = [step for step in steps if step <= options.up_to]
    if not steps:
        return None
    values = moving_average(np.stack([run.series(key, steps) for run in runs]), smooth)
    mean, low, high = options.bootstrap.curve(values, arm)
    return Curve(steps, mean, low, high, len(runs))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the comparison for JSON; values that are not finite become null."""

    def number(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    def interval(i: Interval) -> dict[str, Any]:
        return {
            "value": number(i.value),
            "low": number(i.low),
            "high": number(i.high),
            "runs": i.runs,
        }

    options = comparison.options
    return {
        "options": {
            "baseline": comparison.baseline,
            "reward": options.reward,
            "window": comparison.window,
            "smooth": options.smooth,
            "confidence": options.bootstrap.confidence,
            "bootstrap_samples": options.bootstrap.samples,
            "bootstrap_seed": options.bootstrap.seed,
            "allow_differences": options.allow_differences,
        },
        "steps": [comparison.steps[0], comparison.steps[-1]],
        "notes": comparison.notes,
        "conflicts": comparison.agreement.conflicts,
        "settings": comparison.agreement.differing,
        "arms": {
            arm: [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "seed": run.seed,
                    "steps": len(run.training_steps(options.reward)),
                }
                for run in runs
            ]
            for arm, runs in comparison.arms.items()
        },
        "quantities": [
            {
                "id": q.id,
                "group": q.group,
                "label": q.label,
                "statistic": "median" if q.steps else "mean",
                "arms": {
                    arm: interval(i) | {"by_run": {name: number(v) for name, v in q.values[arm].items()}}
                    for arm, i in q.arms.items()
                },
                "differences": {
                    arm: interval(d.interval) | {"p": number(d.interval.p), "paired_seeds": list(d.paired)}
                    for arm, d in q.differences.items()
                },
            }
            for q in comparison.quantities
        ],
        "curves": {
            key: {
                arm: {
                    "steps": c.steps,
                    "mean": [number(v) for v in c.mean],
                    "low": [number(v) for v in c.low],
                    "high": [number(v) for v in c.high],
                    "runs": c.runs,
                }
                for arm, c in by_arm.items()
            }
            for key, by_arm in comparison.curves.items()
        },
    }
