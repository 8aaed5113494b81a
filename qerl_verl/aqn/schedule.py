"""Computes the noise level of a training step (QeRL, arXiv 2510.11696, Eq. 8 and Algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qerl_verl.config.settings import AQNSettings


@dataclass(frozen=True)
class AQNSchedule:
    """Gives sigma by training step.

    ``total_steps`` are divided into K stages of equal length. Stage 0 has no noise. Stage k = 1 ..
    K-1 has, with t = (k - 1) / (K - 2):

    - exponential: sigma_start * (sigma_end / sigma_start) ** t
    - linear: sigma_start + (sigma_end - sigma_start) * t
    - cosine: sigma_end + (sigma_start - sigma_end) * (1 + cos(pi t)) / 2
    - logarithmic: sigma_start + (sigma_end - sigma_start) * log(1 + (e - 1) t)

    Eq. 8 as printed divides by K - 1 and therefore never reaches sigma_end; with t as above the
    last stage has exactly sigma_end. With K = 2 the only noisy stage is the last, so it has
    sigma_end. A run with fewer steps than stages has one stage per step.

    Raises:
        ValueError: ``total_steps`` is less than 1.
    """

    settings: AQNSettings
    total_steps: int

    def __post_init__(self):
        if self.total_steps < 1:
            raise ValueError(f"the run has {self.total_steps} training steps; at least one is needed")

    @property
    def num_stages(self) -> int:
        """K, or the number of steps if that is smaller."""
        return min(self.settings.num_stages, self.total_steps)

    def stage(self, step: int) -> int:
        """Returns the stage of a step.

        Args:
            step: 1 .. total_steps, as verl counts (``global_steps``). Later steps stay in the last
                stage.

        Raises:
            ValueError: ``step`` is less than 1.
        """
        if step < 1:
            raise ValueError(f"training steps count from 1, got {step}")
        return min((step - 1) * self.num_stages // self.total_steps, self.num_stages - 1)

    def sigma_of_stage(self, stage: int) -> float:
        """Returns the standard deviation of the noise in a stage.

        It is 0.0 in stage 0 and where the noise is off.
        """
        s = self.settings
        if stage == 0 or not s.enable:
            return 0.0
        if stage == self.num_stages - 1:
            return s.sigma_end
        t = (stage - 1) / (self.num_stages - 2)
        if s.schedule == "exponential":
            return s.sigma_start * (s.sigma_end / s.sigma_start) ** t
        if s.schedule == "linear":
            return s.sigma_start + (s.sigma_end - s.sigma_start) * t
        if s.schedule == "cosine":
            return s.sigma_end + (s.sigma_start - s.sigma_end) * (1 + math.cos(math.pi * t)) / 2
        if s.schedule == "logarithmic":
            return s.sigma_start + (s.sigma_end - s.sigma_start) * math.log1p((math.e - 1) * t)
        raise ValueError(f"unknown schedule {s.schedule!r}")

    def sigma(self, step: int) -> float:
        """Returns the standard deviation of the noise under which a step samples."""
        return self.sigma_of_stage(self.stage(step))

    def bounds(self) -> dict[str, float]:
        """Returns the first and the last sigma, keyed by their description for a message."""
        first, last = min(1, self.num_stages - 1), self.num_stages - 1
        return {"in the first noisy stage": self.sigma_of_stage(first), "in the last": self.sigma_of_stage(last)}
