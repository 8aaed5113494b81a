"""Lists the metrics that are compared: their names in verl 0.9 and in QeRL's trainers, and labels.

Sources in verl: trainer/ppo/metric_utils.py, trainer/ppo/rollout_corr_helper.py,
trainer/ppo/v1/trainer_base.py; in QeRL: :class:`qerl_verl.trainer.noise.NoiseMixin`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qerl_verl.compare.runs import SCORE

VALIDATION = re.compile(r"^val-core/.*/mean@\d+$")
"""The metrics that verl chooses among its validation metrics (trainer_base.py,
_val_metrics_update), without those of several answers (``best@N``, ``maj@N``)."""

STEP_SECONDS = "timing_s/step"
SECONDS = re.compile(r"^timing_s/(?!step$)[^/]+$")

SIGMA = "qerl/aqn_sigma"
SIGMA_EFFECTIVE = "qerl/aqn_sigma_effective"
STEPPED = (SIGMA, SIGMA_EFFECTIVE)
"""Metrics that are constant by stage; smoothing would show values that never occurred."""


@dataclass(frozen=True)
class Metric:
    """A metric that verl or QeRL logs each step.

    Attributes:
        key: its name in the log.
        label: text for a table or the title of a panel.
        unit: text for an axis; empty without a unit.
    """

    key: str
    label: str
    unit: str = ""


POLICY = (
    Metric("actor/entropy", "entropy, clean policy", "nats a token"),
    Metric("qerl/sampling_entropy", "entropy, sampling policy", "nats a token"),
    Metric("response_length/mean", "response length", "tokens"),
    Metric("response_length/clip_ratio", "responses cut off", "share"),
    Metric("qerl/sampling_kl", "KL(sampling || clean), k3", "nats a token"),
    Metric("rollout_corr/k3_kl", "KL(rollout || actor), k3 of verl", "nats a token"),
    Metric("qerl/effective_sample_size", "effective sample size", "share"),
    Metric("rollout_corr/rollout_is_eff_sample_size", "effective sample size after truncation", "share"),
    Metric("qerl/truncated_weights", "truncated weights", "share"),
    Metric("rollout_corr/rollout_is_ratio_fraction_high", "weights above the threshold", "share"),
    Metric("training/rollout_probs_diff_mean", "|rollout - actor| probability"),
    Metric("actor/ppo_kl", "KL of the update", "nats a token"),
    Metric("actor/grad_norm", "gradient norm"),
    Metric(SIGMA, "noise, scheduled sigma"),
    Metric(SIGMA_EFFECTIVE, "noise, acting sigma"),
)
"""The metrics, in the order of the tables."""

PANELS = (
    "actor/entropy",
    "qerl/sampling_entropy",
    "response_length/mean",
    "qerl/sampling_kl",
    "rollout_corr/k3_kl",
    "qerl/effective_sample_size",
    "rollout_corr/rollout_is_eff_sample_size",
    "qerl/truncated_weights",
    SIGMA_EFFECTIVE,
    SIGMA,
    STEP_SECONDS,
)
"""Curves of the figure after those of reward and validation.

Where the first of a pair is drawn, verl's metric of the same quantity or the scheduled sigma is
left out.
"""

TWINS = {
    "rollout_corr/k3_kl": "qerl/sampling_kl",
    "rollout_corr/rollout_is_eff_sample_size": "qerl/effective_sample_size",
    "rollout_corr/rollout_is_ratio_fraction_high": "qerl/truncated_weights",
}
"""verl's metric -> QeRL's metric of the same quantity, which every arm of the switch logs."""

REWARDS = (Metric(SCORE, "reward"), Metric("critic/rewards/mean", "reward with KL penalty"))


def find_metric(key: str) -> Metric:
    """Returns the metric of this name. A metric outside the tables is labelled with its name."""
    if key == STEP_SECONDS:
        return Metric(key, "seconds a step", "s")
    if VALIDATION.match(key):
        _, *source, variable, statistic = key.split("/")
        return Metric(key, f"validation {'/'.join(source)}, {variable} {statistic}")
    return next((m for m in (*REWARDS, *POLICY) if m.key == key), Metric(key, key))


def validation_keys(keys: Iterable[str]) -> list[str]:
    """Returns verl's core validation metrics among ``keys``."""
    return sorted(key for key in keys if VALIDATION.match(key))


def second_keys(keys: Iterable[str]) -> list[str]:
    """Returns the metrics of the parts of a step's seconds among ``keys``."""
    return sorted(key for key in keys if SECONDS.match(key))
