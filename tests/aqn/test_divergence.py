"""Tests estimates from the samples' log-probabilities, against distributions with known values."""

import pytest
import torch

from qerl_verl.aqn.divergence import measure_samples, truncation_bounds


def draw(tokens=200_000, seed=0):
    """Draws tokens of one categorical distribution.

    Returns their log-probabilities under it and under another one, and both distributions.
    """
    generator = torch.Generator().manual_seed(seed)
    sampling, clean = torch.randn(2, 16, generator=generator).log_softmax(-1)
    clean = (sampling + 0.2 * clean).log_softmax(-1)
    drawn = torch.multinomial(sampling.exp(), tokens, replacement=True, generator=generator)
    return sampling[drawn].reshape(-1, 100), clean[drawn].reshape(-1, 100), sampling, clean


def test_entropy_divergence_and_effective_sample_size_are_those_of_the_distributions():
    sampled, other, p, q = draw()
    found = measure_samples(sampled, other, torch.ones_like(sampled), bounds=(0.0, 1.1))
    assert found["entropy"] == pytest.approx(-(p.exp() * p).sum().item(), rel=0.01)
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=0.02)
    weights = (q - p).exp()
    assert found["effective_sample_size"] == pytest.approx(1 / (p.exp() * weights**2).sum().item(), rel=0.01)
    assert found["truncated"] == pytest.approx(p.exp()[weights > 1.1].sum().item(), rel=0.01)


def test_equal_policies_have_no_divergence_and_lose_no_sample():
    sampled = draw(tokens=1000)[0]
    found = measure_samples(sampled, sampled, torch.ones_like(sampled))
    assert (found["kl"], found["effective_sample_size"], found["truncated"]) == (0.0, 1.0, 0.0)


def test_tokens_outside_the_mask_and_rows_without_a_token_do_not_count():
    sampled, other, _, _ = draw(tokens=1000)
    mask = torch.zeros_like(sampled)
    mask[:4, :30] = 1
    for level in ("token", "sequence"):
        alone = measure_samples(sampled[:4, :30], other[:4, :30], torch.ones(4, 30), level)
        sampled[4:], other[:, 30:] = float("nan"), float("inf")
        assert measure_samples(sampled, other, mask, level) == pytest.approx(alone)


def test_a_weight_for_a_sequence_is_the_product_of_its_tokens():
    sampled = torch.full((2, 3), -1.0)
    other = sampled + torch.tensor([[0.1, 0.2, 0.3], [-0.5, 0.1, 0.1]])
    found = measure_samples(sampled, other, torch.ones(2, 3), "sequence", (0.0, 1.8))
    w = torch.tensor([0.6, -0.3]).exp()
    assert found["effective_sample_size"] == pytest.approx((w.mean() ** 2 / (w**2).mean()).item(), rel=1e-6)
    assert found["truncated"] == 0.5


def test_without_the_clean_policys_log_probabilities_only_the_entropy_is_known():
    assert measure_samples(torch.full((1, 4), -2.0), None, torch.ones(1, 4)) == {"entropy": 2.0}


@pytest.mark.parametrize(
    ("threshold", "bounds"),
    [(2.0, (0.0, 2.0)), ("2.0", (0.0, 2.0)), ("0.5_5", (0.5, 5.0)), (3, (0.0, 3.0))],
)
def test_verls_thresholds(threshold, bounds):
    from verl.trainer.ppo.rollout_corr_helper import _parse_rollout_is_threshold

    assert truncation_bounds(threshold) == bounds
    upper, lower = _parse_rollout_is_threshold(threshold)
    assert (lower or 0.0, upper) == bounds


def test_the_estimates_are_verls():
    from verl.trainer.ppo.rollout_corr_helper import (
        compute_offpolicy_metrics,
        compute_rollout_correction_weights,
    )

    sampled, other, _, _ = draw(tokens=2000)
    mask = torch.ones_like(sampled)
    mask[3:, 50:] = 0
    found = measure_samples(sampled, other, mask, bounds=(0.0, 1.1))
    theirs = compute_offpolicy_metrics(old_log_prob=other, rollout_log_prob=sampled, response_mask=mask)
    assert found["kl"] == pytest.approx(theirs["k3_kl"], rel=1e-3)
    _, theirs = compute_rollout_correction_weights(other - sampled, mask, "token", 1.1)
    assert found["truncated"] == pytest.approx(theirs["rollout_is_ratio_fraction_high"], rel=1e-6)
    untruncated = measure_samples(sampled, other, mask)["effective_sample_size"]
    _, theirs = compute_rollout_correction_weights(other - sampled, mask, "token", 100.0)
    assert untruncated == pytest.approx(theirs["rollout_is_eff_sample_size"], rel=1e-5)
