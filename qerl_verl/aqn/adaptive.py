"""Noise whose size follows the divergence that it causes: adaptive scaling of parameter noise.

The idea is Plappert et al.'s (arXiv 1706.01905, section 3.1): parameter noise has no size of its
own, only its effect on the policy has, so sigma grows while the noised policy is closer to the
clean one than wanted and shrinks while it is further away. For language models see arXiv
2602.02555, which avoids measuring the divergence because of the forward passes; importance sampling
has made them already here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qerl_verl.config.settings import AQNSettings

MAX_FACTOR = 1.5
"""Most that sigma changes from one measurement to the next."""

KEPT_STEPS = 1000
"""How many steps' sigmas are kept for stale samples."""


@dataclass
class AdaptiveSigma:
    """sigma by training step, decided one step at a time.

    For small noise the divergence D is quadratic in sigma, plus what actor and engine differ by
    without noise, so after step s

        sigma(s + 1) = sigma' * clip(sqrt(target_kl / D), 1 / MAX_FACTOR, MAX_FACTOR)

    within [sigma_end, sigma_start], where D is measured on the samples of step s and sigma' is what
    those were drawn under. An asynchronous trainer trains on samples of earlier steps; measuring
    against their sigma and not the step's keeps the loop from running away meanwhile. The first
    step has ``sigma_end``. The fixed point is D = target_kl.

    Attributes:
        settings: with ``target_kl``.
        sigmas: step -> sigma, of the steps that have been decided.
    """

    settings: AQNSettings
    sigmas: dict[int, float] = field(default_factory=dict)

    def __post_init__(self):
        self.sigmas = self.sigmas or {1: self.settings.sigma_end}

    def sigma(self, step: int) -> float:
        """Returns the standard deviation of the noise under which a step samples: the last one that
        was decided by then."""
        if not self.settings.enable:
            return 0.0
        return self.sigmas[max((s for s in self.sigmas if s <= step), default=min(self.sigmas))]

    def bounds(self) -> dict[str, float]:
        """Returns the largest sigma and the smallest, by what is said of them."""
        return {"at most": self.settings.sigma_start, "at least": self.settings.sigma_end}

    def update(self, step: int, divergence: float, sigmas_of_samples: Sequence[float]) -> float:
        """Decides the sigma of ``step + 1``.

        Args:
            step: the one whose samples were measured.
            divergence: of the sampling policy from the clean one on those samples, nats a token
                (:func:`qerl_verl.aqn.divergence.measure_samples`). Not finite: nothing is learned
                from it.
            sigmas_of_samples: what the samples were drawn under.
        """
        drawn = math.sqrt(sum(s * s for s in sigmas_of_samples) / max(1, len(sigmas_of_samples)))
        if not math.isfinite(divergence) or not drawn:
            decided = self.sigma(step)
        else:
            ratio = self.settings.target_kl / divergence if divergence > 0 else math.inf
            factor = min(MAX_FACTOR, max(1 / MAX_FACTOR, math.sqrt(ratio)))
            decided = min(self.settings.sigma_start, max(self.settings.sigma_end, drawn * factor))
        kept = {s: v for s, v in self.sigmas.items() if step - KEPT_STEPS < s <= step}
        self.sigmas = kept | {step + 1: decided}
        return decided

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON takes it; Python writes floats so that they are read back bit
        for bit."""
        return {"sigmas": {str(step): sigma for step, sigma in self.sigmas.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the run that saved ``state``.

        Raises:
            ValueError: not a state of :meth:`state_dict`.
        """
        try:
            sigmas = {int(step): float(sigma) for step, sigma in state["sigmas"].items()}
        except (KeyError, TypeError, AttributeError, ValueError):
            sigmas = {}
        if not sigmas:
            raise ValueError(f"no noise levels by step in {state!r}")
        self.sigmas = sigmas
