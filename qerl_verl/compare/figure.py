"""Draws one figure with a panel for each metric."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from qerl_verl.compare import metrics as names
from qerl_verl.compare.comparison import TIME, Comparison
from qerl_verl.compare.errors import CompareError

_COLUMNS = 3
_PANEL = (5.0, 3.2)
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's palette, suitable for colour blindness. It repeats with dashed lines."""
_DASHES = ("-", "--", ":", "-.")


def draw(comparison: Comparison, title: str = "") -> bytes:
    """Returns the figure as a PNG.

    Raises:
        CompareError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise CompareError(
            "--png and --html draw with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(comparison)
    seconds = [q for q in comparison.group(TIME) if q.id != names.STEP_SECONDS]
    count = len(panels) + bool(seconds)
    rows = math.ceil(count / _COLUMNS)
    columns = min(_COLUMNS, count)
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows + 1.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, keys in zip(axes, panels, strict=False):
            _draw_panel(axis, comparison, keys)
        rest = axes[len(panels) :]
        if seconds:
            _draw_seconds(rest[0], comparison, seconds)
            rest = rest[1:]
        for axis in rest:
            axis.set_visible(False)
        figure.suptitle("\n".join(filter(None, [title, *_caption(comparison)])), fontsize=10)
        lines = [_line(i) for i in range(len(comparison.arms))]
        handles = [matplotlib.lines.Line2D([], [], **line) for line in lines]
        labels = [f"{arm} ({len(runs)})" for arm, runs in comparison.arms.items()]
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(6, len(labels)),
            title="arm (runs)",
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def write(comparison: Comparison, path: Path, title: str = "") -> None:
    """Writes the figure of :func:`draw` to a file."""
    path.write_bytes(draw(comparison, title))


def _caption(comparison: Comparison) -> list[str]:
    options = comparison.options
    smooth = f"centred moving average of {options.smooth} steps" if options.smooth > 1 else "not smoothed"
    lines = [f"Curves: mean over runs, {smooth} (validation and sigma: not smoothed)"]
    if any(len(runs) > 1 for runs in comparison.arms.values()):
        lines[0] += f"; bands: {options.bootstrap.confidence:.0%} bootstrap interval over runs, step by step"
    if single := [arm for arm, runs in comparison.arms.items() if len(runs) == 1]:
        lines.append(f"One run, so no band: {', '.join(single)}")
    lines += [f"NOT THE SAME: {conflict}" for conflict in comparison.agreement.conflicts]
    return [line if len(line) < 170 else f"{line[:167]}..." for line in lines]


def _panels(comparison: Comparison) -> list[list[str]]:
    """Returns the metrics of each panel; scheduled and effective sigma share one."""
    out = []
    for key, by_arm in comparison.curves.items():
        twin = names.TWINS.get(key)
        if twin in comparison.curves and len(comparison.curves[twin]) >= len(by_arm):
            continue
        if key == names.SIGMA and names.SIGMA_EFFECTIVE in comparison.curves:
            continue
        out.append([key, names.SIGMA] if key == names.SIGMA_EFFECTIVE and names.SIGMA in comparison.curves else [key])
    return out


def _line(index: int) -> dict:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _DASHES[index // len(_COLORS) % len(_DASHES)],
        "linewidth": 1.6,
    }


def _draw_panel(axis, comparison: Comparison, keys: list[str]) -> None:
    key = keys[0]
    metric = names.find_metric(key)
    sparse = bool(names.VALIDATION.match(key))
    alpha = 0.2 if len(comparison.arms) <= 4 else 0.08
    for index, arm in enumerate(comparison.arms):
        line = _line(index)
        if curve := comparison.curves[key].get(arm):
            axis.plot(
                curve.steps,
                curve.mean,
                marker="o" if sparse or len(curve.steps) == 1 else "",
                ms=3,
                **line,
            )
            if not np.isnan(curve.low).all():
                axis.fill_between(
                    curve.steps,
                    curve.low,
                    curve.high,
                    color=line["color"],
                    alpha=alpha,
                    linewidth=0,
                )
        for other in keys[1:]:
            if curve := comparison.curves[other].get(arm):
                axis.plot(curve.steps, curve.mean, **line | {"linestyle": ":", "linewidth": 1.0})
    axis.set_title(metric.label + (" (dotted: scheduled)" if len(keys) > 1 else ""), fontsize=10)
    axis.set_ylabel(metric.unit)
    axis.set_xlabel(f"step ({key})", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_seconds(axis, comparison: Comparison, parts: list) -> None:
    """Draws stacked bars of the parts of a step, without the parts of only some steps."""
    left = np.zeros(len(comparison.arms))
    total = {q.id: q for q in comparison.group(TIME)}.get(names.STEP_SECONDS)
    for index, part in enumerate(parts):
        values = np.nan_to_num([part.arms[arm].value for arm in comparison.arms])
        axis.barh(
            range(len(left)),
            values,
            left=left,
            label=part.label,
            color=f"C{index % 10}",
            height=0.6,
        )
        left += values
    if total is not None:
        rest = np.maximum(0.0, np.nan_to_num([total.arms[arm].value for arm in comparison.arms]) - left)
        axis.barh(range(len(left)), rest, left=left, label="other", color="lightgrey", height=0.6)
    axis.set_yticks(range(len(left)), list(comparison.arms))
    axis.invert_yaxis()
    axis.set_title("parts of a step", fontsize=10)
    axis.set_xlabel("s, median over steps")
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
