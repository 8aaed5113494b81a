"""Measures how far the sampling policy is from the clean one, from log-probabilities of samples."""

from __future__ import annotations

import torch

LOG_RATIO_BOUND = 20.0
"""Bound to which log ratios are clamped before they are exponentiated, as in verl
(trainer/ppo/rollout_corr_helper.py)."""


def measure_samples(
    sampled: torch.Tensor,
    clean: torch.Tensor | None,
    mask: torch.Tensor,
    level: str = "token",
    bounds: tuple[float, float] = (0.0, 2.0),
) -> dict[str, float]:
    """Returns estimates over the tokens of a batch.

    With r = clean - sampled and importance weights w = exp(r):

    - ``entropy``: mean of -sampled, the entropy of the sampling policy in nats per token;
    - ``kl``: mean of w - 1 - r (the k3 estimator, http://joschu.net/blog/kl-approx.html) of
      KL(sampling || clean), in nats per token;
    - ``effective_sample_size``: (sum w)^2 / (n sum w^2) of the weights before truncation, 1 for
      equal policies;
    - ``truncated``: fraction of the weights outside ``bounds``.

    Args:
        sampled: ``[batch, tokens]``, log-probabilities under the policy that drew the tokens.
        clean: ``[batch, tokens]``, log-probabilities under the policy that is trained. None where
            they were not computed; the result then has only the entropy.
        mask: ``[batch, tokens]``, non-zero on the tokens that count, at least one.
        level: ``token``, or ``sequence``: one weight per row, exp of the row's sum of r.
        bounds: limits outside of which verl truncates or drops a weight.
    """
    mask = mask.bool()
    sampled = sampled.double()
    found = {"entropy": -sampled[mask].mean().item()}
    if clean is None:
        return found
    log_ratio = torch.where(mask, clean.double() - sampled, 0.0)
    tokens = log_ratio[mask].clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    found["kl"] = (tokens.exp() - 1 - tokens).mean().item()
    if level == "sequence":
        rows = log_ratio.sum(-1)[mask.any(-1)].clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        weights = rows.exp()
    else:
        weights = tokens.exp()
    found["effective_sample_size"] = (weights.mean().square() / weights.square().mean()).item()
    outside = (weights < bounds[0]) | (weights > bounds[1])
    found["truncated"] = outside.double().mean().item()
    return found


def truncation_bounds(threshold: float | str) -> tuple[float, float]:
    """Returns the bounds in ``algorithm.rollout_correction.rollout_is_threshold``.

    Args:
        threshold: an upper bound, or ``lower_upper``.
    """
    lower, _, upper = str(threshold).rpartition("_")
    return float(lower or 0.0), float(upper)
