"""Formats the comparison as tables of text, for the terminal and for the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qerl_verl.compare.comparison import (
    FIRST,
    LAST,
    REWARD,
    TIME,
    WHOLE,
    Comparison,
    Difference,
    Quantity,
)
from qerl_verl.compare.settings import show_value
from qerl_verl.compare.statistics import Interval

NOTHING = "-"
NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: text above the table.
        head: headings of the columns; the first column names the rows.
        rows: cells; a line break separates a value from its interval.
    """

    title: str
    head: list[str]
    rows: list[list[str]]

    def columns(self, most: int) -> list[Table]:
        """Splits the table into tables of at most ``most`` columns after the first."""
        rest = range(1, len(self.head), most)
        parts = [slice(start, start + most) for start in rest] or [slice(1, 1)]
        return [
            Table(self.title, [self.head[0], *self.head[p]], [[row[0], *row[p]] for row in self.rows]) for p in parts
        ]


def tables(comparison: Comparison, everything: bool = False) -> list[Table]:
    """Returns the tables, each followed by the differences from the baseline if there are any.

    Args:
        comparison: what to show.
        everything: show the policy's metrics also over the first and over all steps, not only over
            the last steps.
    """
    out = [_runs_table(comparison)]
    confidence = comparison.options.bootstrap.confidence
    window, steps, baseline = comparison.window, comparison.steps, comparison.baseline
    last = f"last {window} steps ({steps[-window]} to {steps[-1]})"
    titles = {
        REWARD: f"{comparison.options.reward}, steps {steps[0]} to {steps[-1]}",
        LAST: f"mean over the {last}",
        FIRST: f"mean over the first {window} steps ({steps[0]} to {steps[window - 1]})",
        WHOLE: f"mean over steps {steps[0]} to {steps[-1]}",
        TIME: f"seconds a step, median over steps {steps[0]} to {steps[-1]}",
    }
    for group, title in titles.items():
        if group in (FIRST, WHOLE) and not everything:
            continue
        quantities = comparison.group(group)
        if not quantities:
            continue
        rows = [[q.label, *(format_quantity(q, arm) for arm in comparison.arms)] for q in quantities]
        out.append(Table(title, ["", *comparison.arms], rows))
        others = [arm for arm in comparison.arms if arm != baseline]
        if others:
            rows = [
                [q.label, *(format_difference(q.differences[arm], confidence) for arm in others)] for q in quantities
            ]
            rows = [row for row in rows if set(row[1:]) != {NOTHING}]
        if others and rows:
            out.append(Table(f"{title}: difference from {baseline}", ["", *others], rows))
    return out


def settings_table(comparison: Comparison) -> Table | None:
    """Returns the settings that differ between arms, or None without known differences."""
    differing = comparison.agreement.differing
    if not differing:
        return None
    rows = [
        [key, *(show_value(by_arm[arm]) if arm in by_arm else NOTHING for arm in comparison.arms)]
        for key, by_arm in differing.items()
    ]
    return Table("settings that the arms do not share", ["", *comparison.arms], rows)


def _runs_table(comparison: Comparison) -> Table:
    rows = []
    for arm, runs in comparison.arms.items():
        seeds = ", ".join(NOTHING if run.seed is None else str(run.seed) for run in runs)
        lengths = [len(run.training_steps(comparison.options.reward)) for run in runs]
        span = str(lengths[0]) if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
        name = f"{arm} (baseline)" if arm == comparison.baseline and len(comparison.arms) > 1 else arm
        rows.append([name, str(len(runs)), seeds, span, ", ".join(run.name for run in runs)])
    return Table("arms", ["arm", "runs", "seeds", "steps", "names"], rows)


def explain_intervals(comparison: Comparison) -> list[str]:
    """Returns sentences that explain how the intervals were computed."""
    bootstrap = comparison.options.bootstrap
    out = []
    if any(len(runs) > 1 for runs in comparison.arms.values()):
        out.append(
            f"Intervals: percentile bootstrap over runs, {bootstrap.confidence:.0%}, "
            f"{bootstrap.samples} resamples, seed {bootstrap.seed}."
        )
    paired = {d.paired for q in comparison.quantities for d in q.differences.values() if d.paired}
    if paired:
        said = "; ".join(", ".join(map(str, seeds)) for seeds in sorted(paired))
        out.append(f"Differences are taken seed by seed where two arms share at least two seeds (seeds {said}).")
    if any(d.interval.has_interval for q in comparison.quantities for d in q.differences.values()):
        out.append(
            f"A star marks p < {1 - bootstrap.confidence:.2g} of a t test over runs, paired where "
            "the difference is, else Welch's; not corrected for the number of comparisons."
        )
    return out


def format_number(value: float) -> str:
    """Formats a number with four significant digits."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return NOT_REACHED
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _limits(interval: Interval) -> str:
    return f"\n[{format_number(interval.low)}, {format_number(interval.high)}]" if interval.has_interval else ""


def format_quantity(quantity: Quantity, arm: str) -> str:
    """Returns an arm's value, with its interval on a second line.

    A number of steps also has the number of runs that reached it.
    """
    interval = quantity.arms[arm]
    text = format_number(interval.value) + _limits(interval)
    values = list(quantity.values[arm].values())
    if quantity.steps and any(map(math.isinf, values)) and len(values) > 1:
        text += f"\n{sum(map(math.isfinite, values))} of {len(values)} runs"
    return text


def format_difference(difference: Difference, confidence: float) -> str:
    """Formats a difference with its sign, and with a star if its t test is significant."""
    interval = difference.interval
    text = format_number(interval.value)
    if math.isfinite(interval.value) and interval.value > 0:
        text = f"+{text}"
    star = " *" if interval.p < 1 - confidence else ""
    return f"{text}{star}{_limits(interval)}"
