"""Adapts the noise to the divergence that it causes (adaptive scaling of parameter noise).

The idea is Plappert et al.'s (arXiv 1706.01905, section 3.1). Only the effect of parameter noise on
the policy can be compared between models, so sigma grows while the noised policy is closer to the
clean one than the target, and shrinks while it is further away. For language models see arXiv
2602.02555, which avoids measuring the divergence because of the forward passes. Here importance
sampling has already run these passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qerl_verl.config.settings import AQNSettings

MAX_FACTOR = 1.5
"""Largest factor by which sigma changes from one measurement to the next."""

KEPT_STEPS = 1000
"""Number of steps whose sigmas are kept for stale samples."""


@dataclass
class AdaptiveSigma:
    """Gives sigma by training step, and decides it one step at a time.

    For small noise the divergence D is quadratic in sigma, plus the difference between actor and
    engine without noise. After step s

        sigma(s + 1) = sigma' * clip(sqrt(target_kl / D), 1 / MAX_FACTOR, MAX_FACTOR)

    within [sigma_end, sigma_start]. D is measured on the samples of step s, and sigma' is the sigma
    under which those were drawn. An asynchronous trainer trains on samples of earlier steps.
    Measuring against their sigma, and not that of the step, keeps the loop from running away. The
    first step has ``sigma_end``. The fixed point is D = target_kl.

    Attributes:
        settings: the settings of the noise, with ``target_kl``.
        sigmas: step -> sigma, for the steps that have been decided.
    """

    settings: AQNSettings
    sigmas: dict[int, float] = field(default_factory=dict)

    def __post_init__(self):
        self.sigmas = self.sigmas or {1: self.settings.sigma_end}

    def sigma(self, step: int) -> float:
        """Returns the standard deviation of the noise under which a step samples.

        This is the last sigma that was decided by then, or 0.0 where the noise is off.
        """
        if not self.settings.enable:
            return 0.0
        return self.sigmas[max((s for s in self.sigmas if s <= step), default=min(self.sigmas))]

    def bounds(self) -> dict[str, float]:
        """Returns the largest and the smallest sigma, keyed by their description for a message."""
        return {"at most": self.settings.sigma_start, "at least": self.settings.sigma_end}

    def update(self, step: int, divergence: float, sigmas_of_samples: Sequence[float]) -> float:
        """Decides the sigma of ``step + 1``.

        Args:
            step: the step whose samples were measured.
            divergence: divergence of the sampling policy from the clean one on those samples, in
                nats per token (:func:`qerl_verl.aqn.divergence.measure_samples`). A value that is
                not finite leaves sigma as it is.
            sigmas_of_samples: the sigmas under which the samples were drawn.

        Returns:
            The sigma of ``step + 1``.
        """
        drawn = math.sqrt(sum(s * s for s in sigmas_of_samples) / max(1, len(sigmas_of_samples)))
        if not math.isfinite(divergence) or not drawn:
            decided = self.sigma(step)
        else:
            assert self.settings.target_kl is not None, "AQNSettings requires it for this schedule"
            ratio = self.settings.target_kl / divergence if divergence > 0 else math.inf
            factor = min(MAX_FACTOR, max(1 / MAX_FACTOR, math.sqrt(ratio)))
            decided = min(self.settings.sigma_start, max(self.settings.sigma_end, drawn * factor))
        kept = {s: v for s, v in self.sigmas.items() if step - KEPT_STEPS < s <= step}
        self.sigmas = kept | {step + 1: decided}
        return decided

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint, as JSON takes it.

        Python writes floats so that they are read back bit for bit.
        """
        return {"sigmas": {str(step): sigma for step, sigma in self.sigmas.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues as the run that saved ``state``.

        Raises:
            ValueError: ``state`` is not from :meth:`state_dict`.
        """
        try:
            sigmas = {int(step): float(sigma) for step, sigma in state["sigmas"].items()}
        except (KeyError, TypeError, AttributeError, ValueError):
            sigmas = {}
        if not sigmas:
            raise ValueError(f"no noise levels by step in {state!r}")
        self.sigmas = sigmas
