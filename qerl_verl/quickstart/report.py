"""Turns verl's metrics of a run into a table, a JSON summary and a plot."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_verl.compare.errors import CompareError
from qerl_verl.compare.runs import read_steps

REWARD = "critic/score/mean"
ENTROPY = "actor/entropy"
DIFFERENCE = "training/rollout_probs_diff_mean"
SIGMA = "qerl/aqn_sigma"
STAGE = "qerl/aqn_stage"
PHASES = ("gen", "old_log_prob", "adv", "update_actor", "update_weights", "step")
EDGE = 5
"""Steps at either end that the table averages over; half of the steps in a run of fewer than
ten."""


@dataclass(frozen=True)
class Run:
    """Metrics by step, oldest first; step 0 holds only the first validation."""

    steps: dict[int, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Reads the file of verl's ``file`` logger, see :func:`qerl_verl.compare.runs.read_steps`.

        The result has no steps where the file is missing or empty.
        """
        try:
            return cls(read_steps(path)[0])
        except (CompareError, FileNotFoundError):
            return cls({})

    @property
    def training(self) -> list[int]:
        """Numbers of the steps that trained."""
        return [s for s, m in self.steps.items() if REWARD in m]

    def mean(self, metric: str, steps: list[int]) -> float:
        values = [self.steps[s][metric] for s in steps if metric in self.steps[s]]
        return sum(values) / len(values) if values else float("nan")

    def validation(self) -> list[tuple[int, float]]:
        """Returns step and accuracy of each validation."""
        return [
            (s, v)
            for s, m in self.steps.items()
            for k, v in m.items()
            if k.startswith("val-core/") and "/acc/mean" in k
        ]

    def by_stage(self, metric: str) -> dict[int, float]:
        """Returns the mean of a metric over the steps of each noise stage."""
        stages: dict[int, list[int]] = {}
        for s in self.training:
            stages.setdefault(int(self.steps[s].get(STAGE, 0)), []).append(s)
        return {stage: self.mean(metric, steps) for stage, steps in stages.items()}


def kernels(log: str) -> list[str]:
    """Returns the kernels of actor and rollout, from the log's lines ``[qerl] kernel: ...``."""
    return list(dict.fromkeys(re.findall(r"\[qerl\] kernel: (.*)", log)))


def summarize(run: Run, samples_per_step: int, seconds: dict[str, float], log: str) -> dict[str, Any]:
    """Returns the numbers of the table.

    Args:
        run: the metrics.
        samples_per_step: number of scored responses in a step.
        seconds: wall-clock seconds of the phases outside the training loop.
        log: verl's log.

    Raises:
        ValueError: the run has no training step.
    """
    training = run.training
    if not training:
        raise ValueError("the run logged no training step")
    edge = max(1, min(EDGE, len(training) // 2))
    first, last = training[:edge], training[-edge:]
    return {
        "steps": len(training),
        "samples_per_end": edge * samples_per_step,
        "steps_per_end": edge,
        "reward": [run.mean(REWARD, first), run.mean(REWARD, last)],
        "entropy": [run.mean(ENTROPY, first), run.mean(ENTROPY, last)],
        "validation": run.validation(),
        "sigma_by_stage": run.by_stage(SIGMA),
        "rollout_probs_diff_by_stage": run.by_stage(DIFFERENCE),
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "seconds_per_step": {
            phase: round(mean, 3) for phase in PHASES if not math.isnan(mean := run.mean(f"timing_s/{phase}", training))
        },
        "kernels": kernels(log),
    }


def table(summary: dict[str, Any]) -> str:
    """Formats the summary for a terminal."""
    n, k = summary["samples_per_end"], summary["steps_per_end"]
    rows = [
        (f"reward, first -> last {k} steps ({n} samples each)", _arrow(summary["reward"])),
        ("policy entropy, same steps", _arrow(summary["entropy"])),
        ("validation accuracy (by step)", ", ".join(f"{v:.3f} ({s})" for s, v in summary["validation"]) or "-"),
        ("AQN sigma by stage", _stages(summary["sigma_by_stage"], "{:.2g}")),
        ("|rollout - training| probability by stage", _stages(summary["rollout_probs_diff_by_stage"], "{:.4f}")),
        ("seconds by phase", ", ".join(f"{p} {s:.0f}" for p, s in summary["seconds"].items())),
        ("seconds a step", ", ".join(f"{p} {s:.2f}" for p, s in summary["seconds_per_step"].items())),
        *(("kernel", text) for text in summary["kernels"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _arrow(pair: list[float]) -> str:
    return f"{pair[0]:.3f} -> {pair[1]:.3f}"


def _stages(values: dict[int, float], form: str) -> str:
    return " | ".join(form.format(v) for _, v in sorted(values.items()))


def plot(run: Run, path: Path) -> None:
    """Plots reward, entropy and sigma by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = run.training
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(7, 7), layout="constrained")
    for axis, metric, name in zip(
        axes, (REWARD, ENTROPY, SIGMA), ("reward", "policy entropy", "AQN sigma"), strict=True
    ):
        axis.plot(
            steps,
            [run.steps[s].get(metric, float("nan")) for s in steps],
            drawstyle="default" if metric != SIGMA else "steps-mid",
        )
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    for step, accuracy in run.validation():
        axes[0].plot(step, accuracy, "o", color="tab:orange")
    axes[0].plot([], [], "o", color="tab:orange", label="validation accuracy (clean policy)")
    axes[0].legend(loc="lower right")
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)
