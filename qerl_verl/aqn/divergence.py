"""How far the policy that sampled is from the clean one, from the log-probabilities of the sampled
tokens."""

from __future__ import annotations

import torch

LOG_RATIO_BOUND = 20.0
"""Log ratios are clamped to this before they are exponentiated, as in verl
(trainer/ppo/rollout_corr_helper.py)."""


def measure_samples(
    sampled: torch.Tensor,
    clean: torch.Tensor | None,
    mask: torch.Tensor,
    level: str = "token",
    bounds: tuple[float, float] = (0.0, 2.0),
) -> dict[str, float]:
    """Returns estimates over the tokens of a batch. With r = clean - sampled and importance weights
    w = exp(r):

    - ``entropy``: mean of -sampled, of the policy that sampled, nats a token;
    - ``kl``: mean of w - 1 - r (the k3 estimator, http://joschu.net/blog/kl-approx.html) of
      KL(sampling || clean), nats a token;
    - ``effective_sample_size``: (sum w)^2 / (n sum w^2), 1 for equal policies, of the weights
      before truncation;
    - ``truncated``: share of the weights outside ``bounds``.

    Args:
        sampled: ``[batch, tokens]``, log-probabilities under the policy that drew the tokens.
        clean: the same under the policy that is trained; None where it was not computed: then only
            the entropy is known.
        mask: ``[batch, tokens]``, non-zero on the tokens that count. At least one.
        level: ``token``, or ``sequence``: one weight a row, exp of the row's sum of r.
        bounds: outside of which verl truncates or drops a weight.
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
    """From ``algorithm.rollout_correction.rollout_is_threshold``: an upper bound, or
    ``lower_upper``."""
    lower, _, upper = str(threshold).rpartition("_")
    return float(lower or 0.0), float(upper)
