"""The metrics that are compared: their names in verl 0.9 and in QeRL's trainers, and how they are
shown.

verl: trainer/ppo/metric_utils.py, trainer/ppo/rollout_corr_helper.py,
trainer/ppo/v1/trainer_base.py. QeRL: :class:`qerl_verl.trainer.ppo.AQNTrainerMixin`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qerl_verl.compare.runs import SCORE

VALIDATION = re.compile(r"^val-core/.*/mean@\d+$")
"""verl's own choice among its validation metrics (trainer_base.py, _val_metrics_update), without
those of several answers (``best@N``, ``maj@N``)."""

STEP_SECONDS = "timing_s/step"
SECONDS = re.compile(r"^timing_s/(?!step$)[^/]+$")

SIGMA = "qerl/aqn_sigma"
SIGMA_EFFECTIVE = "qerl/aqn_sigma_effective"
STEPPED = (SIGMA, SIGMA_EFFECTIVE)
"""Constant by stage, so that smoothing would show values that never acted."""


@dataclass(frozen=True)
class Metric:
    """A metric that verl or QeRL logs each step.

    Attributes:
        key: its name in the log.
        label: for a table or the title of a panel.
        unit: for an axis; empty where it has none.
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
"""In the order of the tables."""

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
"""Curves of the figure after those of the reward and of the validation; of a pair whose first is
drawn, verl's own twin and the scheduled sigma are left out."""

TWINS = {
    "rollout_corr/k3_kl": "qerl/sampling_kl",
    "rollout_corr/rollout_is_eff_sample_size": "qerl/effective_sample_size",
    "rollout_corr/rollout_is_ratio_fraction_high": "qerl/truncated_weights",
}
"""verl's metric -> QeRL's of the same quantity, which every arm behind the switch logs."""

REWARDS = (Metric(SCORE, "reward"), Metric("critic/rewards/mean", "reward with KL penalty"))


def find_metric(key: str) -> Metric:
    """Returns the metric with this name; one that is not in the tables is shown under its own name."""
    if key == STEP_SECONDS:
        return Metric(key, "seconds a step", "s")
    if VALIDATION.match(key):
        _, *source, variable, statistic = key.split("/")
        return Metric(key, f"validation {'/'.join(source)}, {variable} {statistic}")
    return next((m for m in (*REWARDS, *POLICY) if m.key == key), Metric(key, key))


def validation_keys(keys: Iterable[str]) -> list[str]:
    """verl's core validation metrics among ``keys``."""
    return sorted(key for key in keys if VALIDATION.match(key))


def second_keys(keys: Iterable[str]) -> list[str]:
    """Returns the parts of a step's seconds among ``keys``."""
    return sorted(key for key in keys if SECONDS.match(key))
